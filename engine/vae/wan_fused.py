"""Wan's VAE as a GPU likes it: the same weights and values as diffusers' modules, computed another way.

* Channels lie last throughout, [F,H,W,C]: nothing is turned between convolutions, and what comes out is
  frames.
* Several latent frames a call. Everything is causal, so their frames are those of one call each.
* What stands between two convolutions is one kernel: bias and residual of the one before, RMSNorm, SiLU, and
  the frames that the next one still sees (kernels/causal_norm.py).
* An enlarged picture is never made. Each of the four pixels that one becomes is a convolution of 2x2 of the
  small picture, whose weights are sums of the 3x3 (Shi et al., arXiv 1609.07009): 16 products, not 36.

`FusedDecoder` and `FusedEncoder` take the place of the streaming modules beside this file, state for state;
statistics and the frames' range are computed in float32, whatever the weights' dtype.

Letters: F frames here, n latent frames, H W height and width here, C channels, Cz latent channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.causal_norm import causal_norm
from ...kernels.common import wide
from .wan_decoder import latent_statistics

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

SEEN = 2
"""Frames before its own that a convolution over three of them sees."""


class _Flow:
    """What flows from layer to layer: a sum [F,H,W,C] that the next kernel makes, of the last convolution's
    output, its bias and a residual; and the frames before, of each causal layer in turn.

    The sum is handed over, not kept, so that its parts are freed as early as can be. At a video's start there
    are no frames before; `following` are those before the next call.
    """

    def __init__(self, states: Sequence[Tensor]) -> None:
        self.first = not states
        self._states = iter(states)
        self.following: list[Tensor] = []
        self._parts: tuple[Tensor, Tensor | None, Tensor | None] | None = None

    def put(self, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> None:
        """x [F,H,W,C] + bias [C] + residual [F,H,W,C] is what comes next."""
        self._parts = (x, bias, residual)

    @property
    def now(self) -> Tensor:
        """What was put, of a sum that is made already."""
        assert self._parts is not None
        return self._parts[0]

    def made(self) -> Tensor:
        """The sum, [F,H,W,C]; it is to be put again, or is gone."""
        x, bias, residual = self._take()
        found = x if bias is None else x + bias
        return found if residual is None else found + residual

    def _take(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        assert self._parts is not None
        parts, self._parts = self._parts, None
        return parts

    def ahead(self, norm: Any = None, seen: int = SEEN, keep: bool = False) -> list[Tensor]:
        """What the next convolution reads, [seen+F,H,W,C], and in front of it, if `keep`, the sum."""
        x, bias, residual = self._take()
        size = x.shape[1:3]
        before = x.new_zeros(seen, *x.shape[1:]) if self.first else _channels_last(next(self._states))
        weight = None if norm is None else norm.gamma.flatten()
        other = None if residual is None else residual.flatten(1, 2)
        summed, ahead, following = causal_norm(
            x.flatten(1, 2), before.flatten(1, 2), weight, bias, other, keep=keep
        )
        self.keep(following.unflatten(1, size))
        return [tensor.unflatten(1, size) for tensor in ((summed, ahead) if keep else (ahead,))]

    def keep(self, following: Tensor) -> None:
        """Frames [seen,H,W,C] for the layer whose turn it is."""
        self.following.append(_channels_first(following))


def _channels_last(x: Tensor) -> Tensor:
    """[1,C,F,H,W] -> [F,H,W,C], contiguous: as it lies, where it comes from here."""
    return x[0].permute(1, 2, 3, 0).contiguous()


def _channels_first(x: Tensor) -> Tensor:
    """[F,H,W,C] -> [1,C,F,H,W], the same memory."""
    return x.permute(3, 0, 1, 2)[None]


class _Fused(nn.Module):
    """What encoder and decoder share."""

    mean: Tensor
    std: Tensor

    def __init__(self, vae: AutoencoderKLWan, coder: Any, point: Any) -> None:
        """coder: the VAE's half; point: its convolution of 1x1x1 on the latents' side."""
        super().__init__()
        self.coder, self.point = coder, point
        self.patch: int = vae.config.patch_size or 1
        mean, std = (statistic.flatten() for statistic in latent_statistics(vae))  # [Cz]
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        for module in coder.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                last = torch.channels_last if module.weight.dim() == 4 else torch.channels_last_3d
                module.weight.data = module.weight.data.contiguous(memory_format=last)

    @property
    def dtype(self) -> torch.dtype:
        """That of weights, states and what is between."""
        return self.point.weight.dtype

    def narrow(self, dtype: torch.dtype) -> None:
        """Puts the weights into `dtype`; the statistics stay as they are."""
        mean, std = self.mean, self.std
        self.to(dtype)
        self.mean, self.std = mean, std

    def _residual(self, block: Any, flow: _Flow) -> None:
        summed, ahead = flow.ahead(block.norm1, keep=True)
        flow.put(_conv3d(block.conv1, ahead), block.conv1.bias)
        del ahead
        (ahead,) = flow.ahead(block.norm2)
        shortcut = block.conv_shortcut
        carried = summed if isinstance(shortcut, nn.Identity) else _linear(shortcut, summed)
        del summed
        flow.put(_conv3d(block.conv2, ahead), block.conv2.bias, carried)

    def _attention(self, block: Any, flow: _Flow) -> None:
        """Of each frame alone, with one head."""
        x = flow.made()
        normed = F.normalize(wide(x), dim=-1) * x.shape[-1] ** 0.5 * wide(block.norm.gamma.flatten())
        q, k, v = _linear(block.to_qkv, normed.type_as(x)).flatten(1, 2)[:, None].chunk(3, dim=-1)
        found = F.scaled_dot_product_attention(q, k, v)  # [F,1,HW,C]
        flow.put(_linear(block.proj, found.reshape(x.shape)), None, x)

    def _middle(self, block: Any, flow: _Flow) -> None:
        self._residual(block.resnets[0], flow)
        for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
            self._attention(attention, flow)
            self._residual(resnet, flow)

    def _begin(self, x: Tensor, flow: _Flow) -> None:
        """The first convolution."""
        flow.put(x.contiguous())
        flow.put(_conv3d(self.coder.conv_in, *flow.ahead()), self.coder.conv_in.bias)

    def _end(self, flow: _Flow) -> Tensor:
        """The last norm and convolution."""
        return _conv3d(self.coder.conv_out, *flow.ahead(self.coder.norm_out)) + self.coder.conv_out.bias


def _conv3d(layer: Any, ahead: Tensor) -> Tensor:
    """A causal convolution without its bias; ahead [G+F,H,W,C] with the frames before."""
    across, _, down, _, _, _ = layer._padding
    x = _channels_first(ahead)
    return _channels_last(F.conv3d(x, layer.weight, stride=layer.stride, padding=(0, down, across)))


def _conv2d(x: Tensor, weight: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    """[F,H,W,C] -> [F,h,w,C'], without a bias."""
    found = F.conv2d(x.permute(0, 3, 1, 2), weight, stride=stride, padding=padding)
    return found.permute(0, 2, 3, 1).contiguous()


def _linear(layer: Any, x: Tensor) -> Tensor:
    """A convolution of one position, on channels that lie last."""
    return F.linear(x, layer.weight.flatten(1), layer.bias)


def _of_shortcut(module: Any, x: Tensor, **options: bool) -> Tensor:
    """Wan2.2's shortcut around a change of size, [F,H,W,C] -> the new size."""
    return _channels_last(module(_channels_first(x), **options))


class FusedDecoder(_Fused):
    """(latents [1,Cz,n,H,W], *states) -> (frames [f,height,width,3] in 0..1, *next states).

    Without states a video's first latent frame, n = 1; else any n. Latents are normalised; states are
    [1,channels,2,h,w] in the weights' dtype, in `DecodeNext`'s order; frames are float32 (float64 of such).
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__(vae, vae.decoder, vae.post_quant_conv)
        for index, block in enumerate(vae.decoder.up_blocks):
            if (layer := _upsampler(block)) is not None:
                weight = subpixel(layer.resample[1].weight.data)
                self.register_buffer(f"pixels_{index}", weight, persistent=False)

    def forward(self, latents: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        flow, coder = _Flow(kept), self.coder
        raw = wide(latents[0].permute(1, 2, 3, 0)) * self.std + self.mean  # [n,H,W,Cz]
        self._begin(_linear(self.point, raw.to(self.dtype)), flow)
        self._middle(coder.mid_block, flow)
        for index, block in enumerate(coder.up_blocks):
            shortcut = None
            if getattr(block, "avg_shortcut", None) is not None:
                flow.put(flow.made())
                shortcut = _of_shortcut(block.avg_shortcut, flow.now, first_chunk=flow.first)
            for resnet in block.resnets:
                self._residual(resnet, flow)
            if (layer := _upsampler(block)) is not None:
                weight, bias = getattr(self, f"pixels_{index}"), layer.resample[1].bias
                flow.put(_enlarged(self._longer(layer, flow), weight, bias), None, shortcut)
        pixels = wide(self._end(flow))  # [f,h,w,3*patch*patch]
        pixels = pixels.unflatten(3, (3, self.patch, self.patch)).permute(0, 1, 5, 2, 4, 3)  # [f,h,ph,w,pw,3]
        frames = (pixels.flatten(3, 4).flatten(1, 2).clamp(-1.0, 1.0) + 1.0) * 0.5
        return frames, *flow.following  # [f,height,width,3]

    def _longer(self, layer: Any, flow: _Flow) -> Tensor:
        """The sum [F,H,W,C], twice as many frames where the layer does that, but not at a video's start."""
        if layer.mode != "upsample3d":
            return flow.made()
        if flow.first:
            x = flow.made()
            flow.keep(x.new_zeros(SEEN, *x.shape[1:]))
            return x
        doubled = _conv3d(layer.time_conv, *flow.ahead()).unflatten(3, (2, -1))  # [F,H,W,2,C]
        frames, height, width, _, channels = doubled.shape
        out = doubled.new_empty(frames, 2, height, width, channels)
        torch.add(doubled.permute(0, 3, 1, 2, 4), layer.time_conv.bias.view(2, 1, 1, channels), out=out)
        return out.flatten(0, 1)  # [2F,H,W,C]


def _enlarged(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Pixels doubled and a convolution 3x3 whose `subpixel` weight is, [F,H,W,C] -> [F,2H,2W,C']."""
    frames, height, width, _ = x.shape
    found = _conv2d(x, weight, padding=1).unflatten(3, (2, 2, -1))  # [F,H+1,W+1,2,2,C']
    out = found.new_empty(frames, height, 2, width, 2, found.shape[-1])
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        part = found[:, row : row + height, column : column + width, row, column]
        torch.add(part, bias, out=out[:, :, row, :, column])
    return out.flatten(3, 4).flatten(1, 2)  # [F,2H,2W,C']


def _upsampler(block: Any) -> Any:
    """The layer of a decoder's block that enlarges, None for none: Wan2.1 has a list, Wan2.2 one."""
    if hasattr(block, "upsampler"):
        return block.upsampler
    return None if block.upsamplers is None else block.upsamplers[0]


def subpixel(weight: Tensor) -> Tensor:
    """Weights of the four convolutions 2x2 that are one of 3x3 on a picture of doubled pixels.

    weight [C',C,3,3] -> [4*C',C,2,2], by row and column of the pixel among its four, then by C'. Output
    (i + row, j + column) of the convolution padded by one is the pixel (2i + row, 2j + column).
    """
    # Of the three pixels under a row (or column) of weights, the first of two sees one neighbour and itself
    # twice, the second itself twice and the other neighbour.
    sums = weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # [pixel,2,3]
    found = torch.einsum("ryi,cxj,onij->rconyx", sums, sums, weight)  # [2,2,C',C,2,2]
    return found.flatten(0, 2).contiguous(memory_format=torch.channels_last)


class FusedEncoder(_Fused):
    """(frames [f,height,width,3] in -1..1, *states) -> (latents [1,Cz,n,H,W], *next states).

    Without states a video's first frame; else the frames of any n later latent frames. Latents are normalised
    and float32 (float64 of such); states are those of `EncodeNext`, in the weights' dtype, and are left out
    unless it `streams`.
    """

    def __init__(self, vae: AutoencoderKLWan, streams: bool = True) -> None:
        super().__init__(vae, vae.encoder, vae.quant_conv)
        self.streams = streams

    def forward(self, frames: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        flow, coder, patch = _Flow(kept), self.coder, self.patch
        x = frames.unflatten(2, (-1, patch)).unflatten(1, (-1, patch))  # [f,h,ph,w,pw,3]
        self._begin(x.permute(0, 1, 3, 5, 4, 2).flatten(3).to(self.dtype), flow)  # [f,h,w,3*pw*ph]
        for layer in coder.down_blocks:
            if not hasattr(layer, "avg_shortcut"):
                self._smaller(layer, flow)
                continue
            flow.put(flow.made())
            shortcut = _of_shortcut(layer.avg_shortcut, flow.now)
            for part in (*layer.resnets, *([] if layer.downsampler is None else [layer.downsampler])):
                self._smaller(part, flow)
            flow.put(flow.made(), None, shortcut)
        self._middle(coder.mid_block, flow)
        raw = _linear(self.point, self._end(flow)).chunk(2, dim=-1)[0]  # [n,H,W,Cz]
        latents = _channels_first((wide(raw) - self.mean) / self.std)
        return latents, *(flow.following if self.streams else ())

    def _smaller(self, layer: Any, flow: _Flow) -> None:
        """One layer on the way down."""
        if hasattr(layer, "conv1"):
            self._residual(layer, flow)
        elif hasattr(layer, "to_qkv"):
            self._attention(layer, flow)
        else:
            convolution = layer.resample[1]
            padded = F.pad(flow.made(), (0, 0, 0, 1, 0, 1))
            flow.put(_conv2d(padded, convolution.weight, stride=2), convolution.bias)
            if layer.mode == "downsample3d":
                self._shorter(layer.time_conv, flow)

    def _shorter(self, convolution: Any, flow: _Flow) -> None:
        """Half as many frames; a video's first is only kept."""
        if flow.first:
            flow.put(flow.made())
            flow.keep(flow.now)
        else:
            flow.put(_conv3d(convolution, *flow.ahead(seen=1)), convolution.bias)


def fused_modules(vae: AutoencoderKLWan, names: Iterable[str], dtype: torch.dtype) -> dict[str, nn.Module]:
    """What runs the graphs `names` as far as they are the VAE's, in the place of the streaming modules.

    The VAE's weights change their layout and dtype; it is to be used no more.
    """
    found: dict[str, nn.Module] = {}
    for kind in ("decode", "encode"):
        if kinds := {f"{kind}_first", kind} & set(names):
            made = FusedDecoder(vae) if kind == "decode" else FusedEncoder(vae, streams="encode" in kinds)
            module = made.eval()
            module.narrow(dtype)
            found |= dict.fromkeys(kinds, module)
    return found
