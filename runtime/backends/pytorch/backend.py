"""PyTorch: the model itself with fused kernels, on the CPU or, as replayed CUDA graphs, on a GPU.

The only backend that imports torch, and the engine with it: a bundle's graphs are those of the engine's
modules, so running these on the bundle's weights gives the same videos. Which weights: weights.py.
"""

from __future__ import annotations

import copy
import functools
import gc
import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ....errors import (
    ConceptMasterError,
    GenerationError,
    InputError,
    OutOfMemory,
    free_memory,
    how_to_install,
    is_out_of_memory,
    not_loaded,
)
from ...bundle_format.graph_list import (
    BY_NAME,
    EACH_TEXT,
    FIRST_FRAME,
    LATER_FRAMES,
    ONCE,
    STEP_GRAPHS,
    other_expert,
)
from ...cpus import usable
from .. import torchrun
from . import memory_plan
from .memory_plan import VAE
from .options import TorchOptions

try:
    import torch

    from ....engine.checkpoints.deltas import merge_deltas
    from ....engine.checkpoints.lazy_weights import settle
    from ....engine.checkpoints.source import SECOND, Choices, loras_of
    from ....engine.config import ModelConfig
    from ....engine.dit import ConceptDiT
    from ....engine.fused import Fusing, fuse, narrow, why_not
    from ....engine.seen import Seen
    from ....engine.step import DenoiseStep, expert_modules, graph_modules
    from ....engine.vae.block_vae import BlockVAE
    from ....engine.vae.wan_fused import fused_modules
    from .causal import causal_half, of_any_length
    from .encoders import Cropped, ShortText, bucket
    from .leader import Leader
    from .shared_step import SharedStep
    from .stepper import Capture, Carried, Stepper, cuda_graphs
    from .weights import count_weights, open_weights
except (ImportError, MemoryError) as error:
    raise not_loaded(
        "the torch backend", f"{how_to_install('export')}; for a GPU '.[export,gpu]'", error
    ) from error

if TYPE_CHECKING:
    from ...bundle_format.find import Bundle
    from ...bundle_format.schema import TensorSpec
    from .ranks import Ranks

log = logging.getLogger(__name__)

CONDITION_INPUTS = ("text", "concept_tokens", "concept_mask")
"""Of `engine.step.Condition`, in its order; a bundle may have fewer of them."""
REQUEST_INPUTS = (*CONDITION_INPUTS, "given", "text_bias", "boxes")
"""What stays the same from step to step, as the pipeline gives it to `condition`, too."""
EACH_STEP = {"state", "time", "guidance", "coefficients"}

Module = Callable[[dict[str, Any]], Mapping[str, Any]]


class TorchBackend:
    """Runs graphs as the engine's modules; arrays are tensors on `device`.

    Weights are loaded once, at the first `load` or `run`, and stay on the device; of two experts each when it
    is asked for, and where the plan has no room for both, one is let go before the other is loaded anew. May
    be used from several threads at once; one runs after the other. threads: for the whole process, of all
    ranks together, None as PyTorch has it; gpus: how many ranks make one request together, which this process
    starts; None: those that torchrun has started, of which this is rank 0; follows: what another rank is one
    of, which has a transformer alone.

    Raises: InputError when `device` is not there, for a bundle in int8, or without weights; OutOfMemory,
    before anything is loaded, when the plan exceeds the memory that is free.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: str,
        threads: int | None,
        options: TorchOptions | None = None,
        gpus: int | None = 1,
        follows: Ranks | None = None,
    ) -> None:
        ranks = gpus or torchrun.world() if follows is None else follows.world
        self._options = options = (options or TorchOptions()).from_here()
        if device == "cuda" and not torch.cuda.is_available():
            built = "it is built without CUDA" if torch.version.cuda is None else "it sees no GPU"
            raise InputError(f"device 'cuda' is not there: this is PyTorch {torch.__version__}, and {built}")
        if bundle.manifest.precision != "fp32":
            raise InputError(
                f"the bundle {str(bundle.folder)!r} is {bundle.manifest.precision}, the torch backend is for "
                "fp32 bundles, whose weights it runs: take such a bundle, or the backend onnxruntime"
            )
        if threads is not None or ranks > 1:
            torch.set_num_threads(max(1, (threads or usable()) // ranks))
        self._bundle, self._manifest = bundle, bundle.manifest
        self._device = torch.device(device)
        self._dtype_name = options.dtype or ("bfloat16" if device == "cuda" else "float32")
        self._dtype: torch.dtype = getattr(torch, self._dtype_name)
        self._lock = threading.RLock()
        self._modules: dict[str, Module] = {}
        self._capture: Capture | None = None
        self._config = config = ModelConfig.from_dict(self._manifest.model)
        self._fusing = Fusing(tier=options.tier, attention=options.attention)
        head_width = config.transformer.attention_head_dim
        if (reason := why_not(self._fusing, self._device, self._dtype, head_width)) is not None:
            raise InputError(reason)
        _, *states = self._manifest.graphs["decode_first"].outputs  # behind the frames
        self._demand = memory_plan.Demand(
            config.to_dict(),  # with what the manifest leaves out
            self._manifest.shapes,
            {part: n for part, n in count_weights(config).items() if follows is None or _steps(part)},
            self._dtype_name,
            graphs=device == "cuda" and ranks == 1,
            decoded=self._manifest.decoded,
            vae_dtype=options.vae_dtype if config.vae.get("kind") != "blocks" else "float32",
            states=sum(math.prod(spec.shape) for spec in states),
            ranks=ranks,
        ).fastest(_free_memory(self._device))
        self._transformers: dict[str, ConceptDiT] = {}  # as they were opened
        self.steppers: dict[str, Stepper] = {}
        """What runs the steps, by their graph, of those whose weights are loaded."""
        log.info("torch %s on %s, %s", torch.__version__, device, self._dtype_name)
        log.info("%s", memory_plan.table(self.plan))
        if options.lossy:
            log.warning("lossy: %s (errors: docs/performance.md)", ", ".join(options.lossy))
        self._check_memory()
        self._leader = None
        if ranks > 1 and follows is None:
            cuts = [self._manifest.shapes.branches, *([1] if options.skip_guidance else [])]
            heads = config.transformer.num_attention_heads
            self._leader = Leader(gpus, bundle, device, threads, options, cuts, heads)

    @property
    def stepper(self) -> Stepper | None:
        """What runs the steps of the only transformer, or of the first; None before its weights are
        loaded."""
        return self.steppers.get(STEP_GRAPHS[0])

    @property
    def plan(self) -> dict[str, int]:
        """The planned memory, see memory_plan.py."""
        return memory_plan.plan(self._demand)

    @property
    def latent_frames(self) -> int:
        """How many latent frames `decode` and `encode` take a call: as many as there is memory for."""
        return self._demand.latent_frames

    def load(self, graphs: Iterable[str]) -> None:
        """Loads the weights; of two experts, where there is room for one, that which stands first in
        `graphs`. Raises as the class, and BundleError for damaged weights."""
        loaded: set[str] = set()
        graphs = list(graphs)
        with self._lock, self._out_of_memory(), self._with_others(graphs):
            if not self._transformers:
                self._modules = self._build()
            for graph in graphs:
                if loaded.isdisjoint(other_expert(graph)) or not self._demand.swapped:
                    self._make_ready(graph)
                    loaded.add(graph)

    def run(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Runs `graph`. inputs: NumPy arrays, exact dtypes and shapes, or what another `run` gave; returns
        arrays by name. `denoise` also looks at "step", int64 [2]: which step of how many, for lossy options.

        Raises: KeyError for a missing input, ValueError for a wrong dtype or shape, OutOfMemory.
        """
        with self._lock, torch.inference_mode(), self._out_of_memory():
            self.load([graph])  # another thread may have let go of it
            held = dict[str, Any]()
            if self._leader is not None and _is_condition(graph):
                request = {name: self.to_host(inputs[name]) for name in REQUEST_INPUTS if name in inputs}
                held["held"] = self._leader.condition(graph, request)
            return {**self._modules[graph](self.taken(graph, inputs)), **held}

    def taken(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What the module of `graph` takes out of the inputs; what they lack of EACH_STEP is left out."""
        signature = self._manifest.graphs[graph]
        absent = EACH_STEP - inputs.keys() | ({"given"} if self._without_picture(inputs) else set())
        wanted = [spec for spec in signature.inputs if spec.name not in absent]
        tensors = {s.name: self._to_device(inputs[s.name], graph, s) for s in wanted}
        if "concept_mask" in tensors:
            seen = Seen.of(torch.as_tensor(inputs["concept_mask"]), self._config)
            self._cut(graph, tensors, seen)
            if tensors.pop("boxes", None) is not None:
                tokens = self._config.concept.tokens_per_concept
                boxes = seen.boxes(torch.as_tensor(inputs["boxes"]), tokens)
                tensors |= {} if boxes is None else {"boxes": boxes.to(self._device)}  # [S,N']
        if graph in STEP_GRAPHS and self._config.concept.side is not None:
            tensors["kept"] = self._pictured(inputs["given"])
        if graph in STEP_GRAPHS:
            tensors |= {name: inputs[name] for name in ("step", "held") if name in inputs}
        if isinstance(bias := inputs.get("text_bias"), np.ndarray) and _is_condition(graph):
            tensors["text_bias"] = torch.from_numpy(bias).to(self._device)
        elif isinstance(bias, torch.Tensor) and graph in STEP_GRAPHS:
            tensors["text_bias"] = bias
        return tensors

    def to_host(self, array: Any) -> np.ndarray:
        """An array as NumPy; waits until it is computed."""
        if isinstance(array, np.ndarray):
            return array
        tensor: torch.Tensor = array.state if isinstance(array, Carried) else array
        wide = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        return wide.cpu().numpy()

    def to_pixels(self, frames: Any) -> np.ndarray:
        """Frames in 0..1 as uint8, rounded on the device. Raises GenerationError when they are not finite."""
        with self._lock, torch.inference_mode():
            found = frames.clamp(0.0, 1.0).mul(255.0).round().to(torch.uint8).cpu().numpy()
            if torch.isfinite(frames).all():
                return cast("np.ndarray", found)
        narrow = "; --vae-dtype bfloat16 or float32 has room for larger values"
        raise GenerationError(
            f"the decoded frames are not finite{narrow if self._demand.vae_dtype == 'float16' else ''}"
        )

    def close(self) -> None:
        """Lets the weights go."""
        with self._lock:
            if self._leader is not None:
                self._leader.close()
            self._modules, self._transformers, self.steppers = {}, {}, {}

    def _to_device(self, array: Any, graph: str, spec: TensorSpec) -> Any:
        if not isinstance(array, np.ndarray):
            return array
        if BY_NAME[graph].runs == LATER_FRAMES:
            spec = of_any_length(spec, array.shape)
        spec.check(graph, array)
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)

    def _cut(self, graph: str, tensors: dict[str, Any], seen: Seen) -> None:
        """Leaves nothing of the concepts but what is seen; no mask, for a step, where none is needed.

        A bundle that takes no concepts has a mask, if its injector is there, but no tokens: then none are.
        """
        tensors["concept_mask"] = seen.mask.to(self._device)
        concept = self._config.concept
        if "concept_tokens" in tensors:
            tensors["concept_tokens"] = seen.tokens(tensors["concept_tokens"])
        elif _is_condition(graph):
            none = torch.zeros(len(seen.concepts), concept.tokens_per_entry, concept.width)
            tensors["concept_tokens"] = none.to(self._device)
        elif not seen.partly:
            del tensors["concept_mask"]

    def _without_picture(self, inputs: Mapping[str, Any]) -> bool:
        """Whether a picture could be the first latent frame, and none is: all frames then have one time,
        which takes less to compute."""
        given = inputs.get("given")
        return self._manifest.begins_clean and isinstance(given, np.ndarray) and not given[:, 0].any()

    def _pictured(self, given: np.ndarray) -> torch.Tensor:
        """Of all patches of pictures of their own size, [1,1+Cz,N,H,W] on the host, those that are picture,
        int64 [P']: the step then has no others, and needs no mask."""
        _, down, across = self._config.transformer.patch_size
        places = np.flatnonzero(given[0, 0, :, ::down, ::across])
        return torch.from_numpy(places).to(self._device)

    def _build(self) -> dict[str, Module]:
        options = self._options
        adapter = None if options.adapter is None else Path(options.adapter)
        loras = loras_of(options.lora, options.lora_scale, options.lora_partial)
        loras += loras_of(options.lora_2, options.lora_2_scale, options.lora_partial, SECOND)
        custom = self._bundle.custom
        merged = () if custom is None else custom.merged
        choices = Choices(adapter=adapter, loras=loras, parts=options.parts, custom=merged)
        place = None if options.weights is None else str(options.weights)
        source = open_weights(self._bundle, place, choices)
        if custom is not None and custom.deltas:
            merge_deltas(source.model, source.tokenizer, custom.deltas)
        log.info("weights of %s", source.origin.name)
        self._transformers = source.model.experts()
        if VAE not in self._demand.elements:  # a follower's
            return {}
        for part, module in source.model.named_children():
            if part not in self._transformers:
                settle(module, self._device, self._dtype)
        modules, found = graph_modules(source.model, source.vae), dict[str, Module]()
        if not isinstance(source.vae, BlockVAE):
            dtype = getattr(torch, self._demand.vae_dtype)
            modules |= fused_modules(source.vae, set(modules), dtype)
        if self._config.concept.side is not None:
            modules["encode_first"] = Cropped(modules["encode_first"])
        self._capture = cuda_graphs() if self._demand.graphs else None  # one pool of memory for all
        for name in self._manifest.graphs:
            if BY_NAME[name].expert:
                continue
            module = modules[name].to(self._device)
            if BY_NAME[name].runs in (FIRST_FRAME, LATER_FRAMES):
                replayed = self._demand.captured and BY_NAME[name].runs == LATER_FRAMES
                capture = self._capture if replayed else None
                found[name] = causal_half(self._manifest.graphs[name], module, capture)
            elif BY_NAME[name].runs == EACH_TEXT:
                short = ShortText(module.to(self._dtype))
                found[name] = self._called(name, short, self._dtype)
            else:
                found[name] = self._called(name, module.to(self._dtype), self._dtype)
        return found

    def _make_ready(self, graph: str) -> None:
        """Loads the expert that `graph` is of, if it is not there, and lets go of the other where the plan
        says so. Lock is held."""
        expert = BY_NAME[graph].expert
        if not expert or graph in self._modules:
            return
        name, transformer = list(self._transformers.items())[expert - 1]
        if self._demand.swapped:
            for other in other_expert(graph):
                self._modules.pop(other, None)
                self.steppers.pop(other, None)
            gc.collect()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            transformer = copy.deepcopy(transformer)  # that stays as it was opened, for the next time
        settle(narrow(transformer, self._dtype), self._device)
        fuse(transformer, self._fusing)
        for own, module in expert_modules(name, transformer).items():
            module.to(self._device)
            if _is_condition(own):  # of the transformer, whose weights have their dtypes
                called = self._called(own, module, self._dtype, for_the_step=True)
                self._modules[own] = functools.partial(_without_padding, called)
            else:
                step = cast("DenoiseStep", module)
                if self._leader is not None:
                    step = SharedStep(step.transformer, self._leader, own)
                self.steppers[own] = self._stepper(step, self._capture)
                self._modules[own] = functools.partial(self._denoise, own)

    def _stepper(self, denoise: DenoiseStep, capture: Capture | None) -> Stepper:
        lossy = self._options.skip_guidance, self._options.step_cache
        return Stepper(denoise, capture, *lossy, self._fusing.bits)

    def _called(
        self, graph: str, module: torch.nn.Module, dtype: torch.dtype, for_the_step: bool = False
    ) -> Module:
        """A module that takes and gives what the graph's signature says; dtype: of its floating-point inputs;
        for_the_step: its outputs, which nothing but the step reads, stay in the module's own form."""

        def call(tensors: dict[str, Any]) -> Mapping[str, Any]:
            signature = self._manifest.graphs[graph]
            taken = CONDITION_INPUTS if _is_condition(graph) else [spec.name for spec in signature.inputs]
            outputs = module(*(_floating(tensors[name], dtype) for name in taken if name in tensors))
            found = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
            return {
                spec.name: value if for_the_step else _floating(value, getattr(torch, spec.dtype))
                for spec, value in zip(signature.outputs, found, strict=True)
            }

        return call

    def _with_others(self, graphs: list[str]) -> AbstractContextManager[None]:
        """Other ranks load what is not there of these graphs, if it is theirs, too."""
        if self._leader is None:
            return nullcontext()
        missing = [graph for graph in graphs if BY_NAME[graph].expert and graph not in self._modules]
        return self._leader.loading(missing)

    def _denoise(self, graph: str, tensors: dict[str, Any]) -> Mapping[str, Any]:
        state, step = tensors.pop("state"), tensors.pop("step", None)
        carried = state if isinstance(state, Carried) else Carried(state)
        index, steps = (0, 1 << 30) if step is None else (int(number) for number in step)
        return {"next_state": self.steppers[graph](carried, tensors, index, steps)}

    def _check_memory(self) -> None:
        free, peak = _free_memory(self._device), self.plan["peak"]
        if free is not None and peak > free:
            raise OutOfMemory(
                f"{memory_plan.size_of(peak)} of memory are planned on {self._device.type}, "
                f"{memory_plan.size_of(free)} are free; {memory_plan.what_fits(self._demand, free)}"
            )

    @contextmanager
    def _out_of_memory(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # on the CPU there is no type for it
            if isinstance(error, ConceptMasterError) or not is_out_of_memory(error):
                raise
            free = _free_memory(self._device) or 0
            held = torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else 0
            raise OutOfMemory(
                f"out of memory on {self._device.type} "
                f"({memory_plan.size_of(self.plan['peak'])} were planned); "
                f"{memory_plan.what_fits(self._demand, free + held)}"
            ) from error


def _is_condition(graph: str) -> bool:
    return BY_NAME[graph].runs == ONCE and BY_NAME[graph].expert > 0


def _without_padding(condition: Module, tensors: dict[str, Any]) -> Mapping[str, Any]:
    """`condition` of the tokens that text_bias [K,T] leaves, if it is there, and the bias of these for the
    step: their number, rounded up, so that few shapes are captured."""
    bias = tensors.pop("text_bias", None)
    if bias is None:
        return condition(tensors)
    kept = bucket(int(bias.isfinite().sum(1).max()), bias.shape[1])
    short = condition(tensors | {"text": tensors["text"][:, :kept]})
    return {**short, "text_bias": bias[:, :kept].contiguous()}


def _steps(part: str) -> bool:
    return part.startswith("transformer")


def _floating(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Floating-point tensors in `dtype`, others as they are."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _free_memory(device: torch.device) -> int | None:
    """Bytes that are free, None where nobody tells."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory()
