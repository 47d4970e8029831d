"""A bundle that is tiny and means nothing, but is real: ONNX graphs with the right signatures, a tokenizer, a
manifest; and the same arithmetic once more in plain NumPy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conceptmaster.hashed import sha256_file
from conceptmaster.runtime.bundle_format import manifest as manifests
from conceptmaster.runtime.bundle_format.hashed_file import HashedFile
from conceptmaster.runtime.bundle_format.pictured import Pictures
from conceptmaster.runtime.bundle_format.schema import (
    Defaults,
    GraphFile,
    Manifest,
    Shapes,
    TensorSpec,
)
from conceptmaster.runtime.solver import make_schedule

N, PX, T, L, DT, P, DP, Q, DC, M = 3, 8, 12, 4, 6, 4, 5, 2, 7, 4
LATENT = (4, 3, 2, 2)
LAYERS, A, E = 2, 2, 3
HEIGHT = WIDTH = 8
FRAMES = 9  # 1 + 4 + 4
WORDS = ["<pad>", "</s>", "<unk>", "a", "ball", "cat", "rolls", "runs", "left", "red", "bad", "and"]


def _weights() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(1).standard_normal
    shapes = {
        "words": (len(WORDS), DT),
        "project": (3, DP),
        "queries": (Q, P),
        "visual": (DP, DC),
        "label": (DT, DC),
        "text_keys": (DT, A * E),
        "text_values": (DT, A * E),
        "concept_keys": (DC, A * E),
        "concept_values": (DC, A * E),
    }
    return {name: (0.3 * draw(shape)).astype(np.float32) for name, shape in shapes.items()}


WEIGHTS = _weights()


class Reference:
    """The fake model in NumPy, written apart from the pipeline: loops over branches, no batching."""

    def text(self, string: str) -> np.ndarray:
        """[T, Dt], zero behind the end."""
        result = np.zeros((T, DT), np.float32)
        ids = [WORDS.index(w) if w in WORDS else 2 for w in string.split()] + [1]
        result[: len(ids)] = WEIGHTS["words"][ids]
        return result

    def concept(self, pixels: np.ndarray, label: str) -> np.ndarray:
        """Normalised pixels [3, px, px], label → concept tokens [Q, Dc]."""
        half = PX // 2
        patches = [pixels[:, r : r + half, c : c + half].mean((1, 2)) for r in (0, half) for c in (0, half)]
        tokens = np.stack(patches) @ WEIGHTS["project"]  # [P, Dp]
        visual = WEIGHTS["queries"] @ tokens @ WEIGHTS["visual"]  # [Q, Dc]
        length = len(label.split()) + 1
        return visual + self.text(label)[:length].sum(0) @ WEIGHTS["label"]

    def velocity(
        self, x: np.ndarray, time: float, text: np.ndarray, concepts: list[np.ndarray]
    ) -> np.ndarray:
        """One guidance branch, x [Cz,F,H,W]."""
        pulls = [(text @ WEIGHTS[f"text_{kind}"]).sum() for kind in ("keys", "values")]
        for concept in concepts:
            pulls += [(concept @ WEIGHTS[f"concept_{kind}"]).sum() for kind in ("keys", "values")]
        return np.tanh(x * (0.5 + time / 1000) + 0.1 * LAYERS * sum(pulls))

    def frames(self, latents: np.ndarray) -> np.ndarray:
        """[Cz,F,H,W] → uint8 [frames,H,W,3]."""
        result, state = [], None
        for f in range(LATENT[1]):
            now = latents[:3, f]
            for _ in range(1 if f == 0 else 4):
                mixed = now if state is None else 0.75 * now + 0.25 * state
                picture = 1 / (1 + np.exp(-mixed))  # [3,h,w]
                picture = picture.repeat(HEIGHT // 2, 1).repeat(WIDTH // 2, 2).transpose(1, 2, 0)
                result.append(np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8))
            state = now
        return np.stack(result)

    def generate(
        self,
        prompt: str,
        concepts: list[tuple[str, np.ndarray]],
        noise: np.ndarray,
        branches: list[tuple[float, str, bool]],
        steps: int,
        solver: str = "euler",
        shift: float = 3.0,
    ) -> np.ndarray:
        """branches: (weight, text, sees the concepts). Returns the video's frames."""
        tokens = [self.concept(pixels, label) for label, pixels in concepts]
        schedule = make_schedule(solver, steps, shift)
        state = np.zeros((M, *LATENT))
        state[0] = noise
        for time, coefficients in zip(schedule.timesteps, schedule.coefficients, strict=True):
            v = sum(
                w * self.velocity(state[0], time, self.text(text), tokens if sees else [])
                for w, text, sees in branches
            )
            state = np.einsum("ij,j...->i...", coefficients, np.concatenate([state, np.asarray(v)[None]]))
        return self.frames(state[0])


def _graph(name: str, nodes: list, inputs: dict, outputs: dict, constants: dict, folder: Path) -> GraphFile:
    import onnx
    from onnx import helper, numpy_helper

    types = {
        "float32": onnx.TensorProto.FLOAT,
        "int64": onnx.TensorProto.INT64,
        "bool": onnx.TensorProto.BOOL,
    }
    values = [
        [helper.make_tensor_value_info(key, types[dtype], shape) for key, (dtype, shape) in side.items()]
        for side in (inputs, outputs)
    ]
    stored = [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()]
    graph = helper.make_graph(nodes, name, values[0], values[1], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    path = folder / f"{name}.onnx"
    path.write_bytes(model.SerializeToString())
    specs = [tuple(TensorSpec(k, d, tuple(s)) for k, (d, s) in side.items()) for side in (inputs, outputs)]
    return GraphFile(path.name, sha256_file(path), *specs)


def _graphs(folder: Path, branches: int, labels: bool) -> dict[str, GraphFile]:
    from onnx.helper import make_node as node

    w, f = WEIGHTS, "float32"
    tokens, mask = (f, (N, Q, DC)), ("bool", (branches, N))
    text_kv, concept_kv = (f, (LAYERS, branches, T, A, E)), (f, (LAYERS, branches, N * Q, A, E))
    made = {}

    def graph(name: str, nodes: list, inputs: dict, outputs: dict, **constants: object) -> None:
        made[name] = _graph(name, nodes, inputs, outputs, constants, folder)

    graph(
        "text_encoder",
        [
            node("Gather", ["words", "token_ids"], ["embedded"]),
            node("Cast", ["token_mask"], ["m"], to=1),
            node("Unsqueeze", ["m", "last"], ["m3"]),
            node("Mul", ["embedded", "m3"], ["text"]),
        ],
        {"token_ids": ("int64", (1, T)), "token_mask": ("bool", (1, T))},
        {"text": (f, (1, T, DT))},
        words=w["words"],
        last=np.array([2]),
    )
    graph(
        "image_encoder",
        [
            node("AveragePool", ["pixels"], ["pooled"], kernel_shape=[PX // 2] * 2, strides=[PX // 2] * 2),
            node("Reshape", ["pooled", "shape"], ["flat"]),
            node("Transpose", ["flat"], ["turned"], perm=[0, 2, 1]),
            node("MatMul", ["turned", "project"], ["picture_tokens"]),
        ],
        {"pixels": (f, (N, 3, PX, PX))},
        {"picture_tokens": (f, (N, P, DP))},
        shape=np.array([N, 3, P]),
        project=w["project"],
    )
    graph(
        "qformer",
        [
            node("MatMul", ["picture_tokens", "visual"], ["v"]),
            node("MatMul", ["queries", "v"], ["visual_queries"]),
        ],
        {"picture_tokens": (f, (N, P, DP))},
        {"visual_queries": tokens},
        visual=w["visual"],
        queries=w["queries"],
    )
    graph(
        "dam",
        [
            node("Cast", ["label_mask"], ["m"], to=1),
            node("Unsqueeze", ["m", "last"], ["m3"]),
            node("Mul", ["label_text", "m3"], ["kept"]),
            node("ReduceSum", ["kept", "one"], ["summed"], keepdims=1),
            node("MatMul", ["summed", "label"], ["bound"]),
            node("Add", ["visual_queries", "bound"], ["concept_tokens"]),
        ],
        {"visual_queries": tokens, "label_text": (f, (N, L, DT)), "label_mask": ("bool", (N, L))},
        {"concept_tokens": tokens},
        last=np.array([2]),
        one=np.array([1]),
        label=w["label"],
    )
    if not labels:
        only = [node("Identity", ["visual_queries"], ["concept_tokens"])]
        graph("dam", only, {"visual_queries": tokens}, {"concept_tokens": tokens})
    nodes = [node("Reshape", ["concept_tokens", "flat"], ["joined"])]
    for kind in ("keys", "values"):
        nodes += [
            node("MatMul", ["text", f"w_text_{kind}"], [f"t_{kind}"]),
            node("Reshape", [f"t_{kind}", "text_heads"], [f"th_{kind}"]),
            node("Expand", [f"th_{kind}", "text_layers"], [f"text_{kind}"]),
            node("MatMul", ["joined", f"w_concept_{kind}"], [f"c_{kind}"]),
            node("Reshape", [f"c_{kind}", "concept_heads"], [f"ch_{kind}"]),
            node("Expand", [f"ch_{kind}", "concept_layers"], [f"concept_{kind}"]),
        ]
    graph(
        "condition",
        nodes,
        {"text": (f, (branches, T, DT)), "concept_tokens": tokens},
        {
            "text_keys": text_kv,
            "text_values": text_kv,
            "concept_keys": concept_kv,
            "concept_values": concept_kv,
        },
        flat=np.array([1, N * Q, DC]),
        text_heads=np.array([1, branches, T, A, E]),
        text_layers=np.array(text_kv[1]),
        concept_heads=np.array([1, 1, N * Q, A, E]),
        concept_layers=np.array(concept_kv[1]),
        **{f"w_{name}": w[name] for name in ("text_keys", "text_values", "concept_keys", "concept_values")},
    )
    _denoise(graph, node, branches, text_kv, concept_kv, mask)
    frame, half = (
        (f, (1, 3, 1, 2, 2)),
        {"starts": np.array([0]), "ends": np.array([3]), "axes": np.array([1])},
    )

    def picture(source: str, count: int) -> list:
        return [
            node("Sigmoid", [source], ["s"]),
            node("Reshape", ["s", "flat"], ["image"]),
            node(
                "Resize",
                ["image", "", "scales"],
                ["large"],
                mode="nearest",
                coordinate_transformation_mode="asymmetric",
                nearest_mode="floor",
            ),
            node("Transpose", ["large"], ["last"], perm=[0, 2, 3, 1]),
            node("Expand", ["last", "many"], ["frames"]),
        ]

    def sizes(count: int) -> dict:
        scales = np.array([1, 1, HEIGHT // 2, WIDTH // 2], np.float32)
        return {"flat": np.array([1, 3, 2, 2]), "scales": scales, "many": np.array([count, HEIGHT, WIDTH, 3])}

    latents = {"latents": (f, (1, LATENT[0], 1, 2, 2))}
    cut = node("Slice", ["latents", "starts", "ends", "axes"], ["now"])
    graph(
        "decode_first",
        [cut, *picture("now", 1), node("Identity", ["now"], ["state_00"])],
        latents,
        {"frames": (f, (1, HEIGHT, WIDTH, 3)), "state_00": frame},
        **half,
        **sizes(1),
    )
    graph(
        "decode",
        [
            cut,
            node("Mul", ["now", "most"], ["a"]),
            node("Mul", ["state_00", "rest"], ["b"]),
            node("Add", ["a", "b"], ["mixed"]),
            *picture("mixed", 4),
            node("Identity", ["now"], ["next_state_00"]),
        ],
        {**latents, "state_00": frame},
        {"frames": (f, (4, HEIGHT, WIDTH, 3)), "next_state_00": frame},
        **half,
        **sizes(4),
        most=np.float32(0.75),
        rest=np.float32(0.25),
    )
    return made


def _denoise(graph: Callable, node: Callable, k: int, text_kv: tuple, concept_kv: tuple, mask: tuple) -> None:
    f = "float32"
    nodes = [
        node("Cast", ["concept_mask"], ["m"], to=1),
        node("Reshape", ["m", "mask_shape"], ["m2"]),
        node("Expand", ["m2", "mask_wide"], ["m3"]),
        node("Reshape", ["m3", "mask_flat"], ["m4"]),
        node("Mul", ["concept_keys", "m4"], ["ck"]),
        node("Mul", ["concept_values", "m4"], ["cv"]),
        node("Concat", ["text_keys", "text_values", "ck", "cv"], ["all"], axis=2),
        node("ReduceSum", ["all", "all_but_branch"], ["pull"], keepdims=0),
        node("Mul", ["pull", "tenth"], ["pull_k"]),
        node("Reshape", ["pull_k", "branch_shape"], ["pull_5"]),
        node("Slice", ["state", "zero", "one", "zero"], ["x"]),
        node("Mul", ["time", "thousandth"], ["t"]),
        node("Add", ["t", "half"], ["gain"]),
        node("Mul", ["x", "gain"], ["driven"]),
        node("Add", ["driven", "pull_5"], ["sum"]),
        node("Tanh", ["sum"], ["v_k"]),
        node("Reshape", ["guidance", "branch_shape"], ["g"]),
        node("Mul", ["v_k", "g"], ["weighted"]),
        node("ReduceSum", ["weighted", "zero"], ["v"], keepdims=1),
        node("Concat", ["state", "v"], ["stack"], axis=0),
        node("Reshape", ["stack", "rows"], ["rows_in"]),
        node("MatMul", ["coefficients", "rows_in"], ["rows_out"]),
        node("Reshape", ["rows_out", "state_shape"], ["next_state"]),
    ]
    graph(
        "denoise",
        nodes,
        {
            "state": (f, (M, *LATENT)),
            "time": (f, (1,)),
            "text_keys": text_kv,
            "text_values": text_kv,
            "concept_keys": concept_kv,
            "concept_values": concept_kv,
            "concept_mask": mask,
            "guidance": (f, (k,)),
            "coefficients": (f, (M, M + 1)),
        },
        {"next_state": (f, (M, *LATENT))},
        mask_shape=np.array([1, k, N, 1]),
        mask_wide=np.array([1, k, N, Q]),
        mask_flat=np.array([1, k, N * Q, 1, 1]),
        all_but_branch=np.array([0, 2, 3, 4]),
        tenth=np.float32(0.1),
        branch_shape=np.array([k, 1, 1, 1, 1]),
        zero=np.array([0]),
        one=np.array([1]),
        thousandth=np.float32(0.001),
        half=np.float32(0.5),
        rows=np.array([M + 1, -1]),
        state_shape=np.array([M, *LATENT]),
    )


def _tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(path))


def write_bundle(folder: Path, branches: int = 2, labels: bool = True) -> Path:
    """Writes the fake bundle into `folder`, which it makes; labels: whether its dam reads them."""
    folder.mkdir(parents=True)
    _tokenizer(folder / "tokenizer.json")
    graphs = _graphs(folder, branches, labels)
    manifests.save(
        Manifest(
            format=1,
            name="fake",
            written_by={"conceptmaster": "0.1.0"},
            model={"name": "fake"},
            shapes=Shapes(N, PX, T, L, DT, Q, DC, branches, M, LATENT, FRAMES, HEIGHT, WIDTH),
            fps=8.0,
            precision="fp32",
            pictures=Pictures((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), (255, 255, 255)),
            defaults=Defaults("unipc", 4, 3.0, 1.0 if branches == 1 else 2.5),
            tokenizer=HashedFile("tokenizer.json", sha256_file(folder / "tokenizer.json")),
            graphs=graphs,
        ),
        folder,
    )
    return folder


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fake bundle with two guidance branches. Not to be changed: copy it first."""
    pytest.importorskip("onnx")
    return write_bundle(tmp_path_factory.mktemp("bundles") / "fake")


@pytest.fixture
def make_bundle(tmp_path: Path) -> Callable[..., Path]:
    """make_bundle(branches=...) writes one of its own."""
    pytest.importorskip("onnx")
    return lambda **options: write_bundle(tmp_path / "made", **options)


@pytest.fixture
def make_experts(bundle: Path, tmp_path: Path, edit_manifest: Callable) -> Callable[..., Path]:
    """make_experts(boundary=0.9, guidance_2=None): the fake bundle as one of two experts, both the same."""
    import copy
    import shutil

    def make(boundary: float = 0.9, guidance_2: float | None = None) -> Path:
        folder = shutil.copytree(bundle, tmp_path / "experts")

        def change(data: dict) -> None:
            data |= {"format": 5, "source": {"name": "weights", "files": []}}
            low = {"name": "transformer_2", "boundary": 0, "guidance": guidance_2}
            data["experts"] = [{"name": "transformer", "boundary": boundary}, low]
            for name in ("condition", "denoise"):
                data["graphs"][f"{name}_2"] = copy.deepcopy(data["graphs"][name])

        edit_manifest(folder, change)
        return folder

    return make


@pytest.fixture
def placing(bundle: Path, tmp_path: Path, edit_manifest: Callable[..., None]) -> Callable[..., Path]:
    """placing(patch=(1, 1, 1)): the fake bundle, which takes boxes in its `denoise`: they do
    nothing there, but that they are read; and in its `qformer`, whose tokens they are added to."""

    def make(patch: tuple[int, int, int] = (1, 1, 1)) -> Path:
        import shutil

        import onnx
        from onnx.helper import make_node, make_tensor_value_info

        folder = shutil.copytree(bundle, tmp_path / "placing")
        shapes = manifests.load(folder).shapes
        tokens = int(np.prod(shapes.latent[1:])) // int(np.prod(patch))
        wanted = {
            "denoise": ("boxes", onnx.TensorProto.BOOL, [tokens, shapes.concepts]),
            "qformer": ("box", onnx.TensorProto.FLOAT, [shapes.concepts, 4]),
        }
        for name, (entry, kind, shape) in wanted.items():
            model = onnx.load(folder / f"{name}.onnx")
            graph, output = model.graph, model.graph.output[0].name
            graph.input.append(make_tensor_value_info(entry, kind, shape))
            for node in graph.node:
                node.output[:] = ["before" if each == output else each for each in node.output]
            graph.node.extend([
                make_node("Cast", [entry], ["drawn"], to=1),
                make_node("ReduceMean", ["drawn"], ["mean"], keepdims=0),  # [], of all of it
                make_node("Add", ["before", "mean"], [output]),
            ])  # fmt: skip
            onnx.checker.check_model(model, full_check=True)
            onnx.save(model, folder / f"{name}.onnx")

        def change(data: dict[str, Any]) -> None:
            data |= {"format": 7, "source": {"name": "weights", "files": []}}
            data["boxes"] = {"per_concept": shapes.latent[1] // patch[0], "required": False}
            data["model"] = {"name": "fake", "transformer": {"patch_size": list(patch)}}
            for name, (entry, _, shape) in wanted.items():
                dtype = "bool" if name == "denoise" else "float32"
                data["graphs"][name]["inputs"].append({"name": entry, "dtype": dtype, "shape": shape})
                data["graphs"][name]["sha256"] = sha256_file(folder / f"{name}.onnx")

        edit_manifest(folder, change)
        return folder

    return make


@pytest.fixture
def reference() -> Reference:
    return Reference()


@pytest.fixture
def edit_manifest() -> Callable[[Path, Callable[[dict], object]], None]:
    """edit_manifest(folder, change): applies change(data) and makes the checksum right again."""
    import hashlib
    import json

    from conceptmaster.runtime.bundle_format import strict_json

    def edit(folder: Path, change: Callable[[dict], object]) -> None:
        path = folder / "manifest.json"
        data = json.loads(path.read_text())
        del data["checksum"]
        change(data)
        data["checksum"] = hashlib.sha256(strict_json.canonical(data)).hexdigest()
        path.write_text(json.dumps(data))

    return edit


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, Path]:
    """Two 8×8 picture files, exactly as large as the fake bundle wants them."""
    from PIL import Image

    paths = {}
    for i, name in enumerate(("ball", "cat")):
        pixels = np.random.default_rng(i).integers(0, 256, (PX, PX, 3), dtype=np.uint8)
        paths[name] = tmp_path / f"{name}.png"
        Image.fromarray(pixels).save(paths[name])
    return paths
