"""The demo's VQVAE as it trains: an encoder of its own, VAR's quantiser with running means, a decoder that starts well.

The shipped file holds the decoder and the codebook, so the encoder is free: it works at a quarter and an eighth of the
picture's size and has no normalisation, which makes it several times as fast as the decoder's mirror image and lets
absolute colours through (GroupNorm with few channels a group all but erases them).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fast_norm import norm_silu
from torch import Tensor, nn

from toprovar.backbones import vqvae as plain
from toprovar.backbones.resample import area_matrix, bicubic_matrix
from toprovar.backbones.vqvae import VQVAE, VQVAESpec

PATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Token grids of the demo: 2130 tokens, three quarters of them in the last two scales, as in the large models."""

# ---------------------------------------------------------------------------------------------------------- encoder


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class Encoder(nn.Module):
    """Pictures `[B, 3, h, w]` in [-1, 1] -> features `[B, d, h/8, w/8]`; the first three begin as the mean colour."""

    def __init__(self, latent: int, outer: int = 128, inner: int = 192, blocks: tuple[int, int] = (2, 3)) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(48, outer, 3, padding=1)
        self.outer = nn.Sequential(*(_Residual(outer) for _ in range(blocks[0])))
        self.down = nn.Conv2d(outer, inner, 2, stride=2)
        self.inner = nn.Sequential(*(_Residual(inner) for _ in range(blocks[1])))
        self.conv_out = nn.Conv2d(inner, latent, 3, padding=1)

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.outer(self.conv_in(F.pixel_unshuffle(pictures, 4)))
        features = self.conv_out(F.silu(self.inner(self.down(x))))
        colour = F.avg_pool2d(pictures, 8).to(features.dtype)
        return features + F.pad(colour, (0, 0, 0, 0, 0, features.shape[1] - 3))


# ---------------------------------------------------------------------------------------------------------- decoder


@torch.no_grad()
def begin_as_enlarging(decoder: nn.Module, seed_channels: int = 3) -> None:
    """Set a new decoder so that its picture is its first three input channels, enlarged: colours are there from step 0.

    Every residual branch starts closed, every convolution between levels starts as a smoothing identity. The first six
    groups of the last GroupNorm carry +R +G +B -R -G -B, each beside a constant that keeps the group from normalising
    the colour away; behind SiLU, silu(v) - silu(-v) = v.
    """
    level = 4.0  # of the constants: large against colours in [-1, 1]

    def identity(conv: nn.Conv2d) -> None:
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    ups, shortcuts = [], []
    for module in decoder.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and "shortcut" in _name(decoder, module):
            identity(module)
            shortcuts.append(module)
        elif isinstance(module, nn.Conv2d) and "upsample" in _name(decoder, module):
            identity(module)
            kernel = torch.tensor([1.0, 2.0, 1.0])
            every = torch.arange(module.weight.shape[0])
            module.weight[every, every] = kernel[:, None] * kernel[None, :] / 16
            ups.append(module)
        elif isinstance(module, nn.Conv2d) and _name(decoder, module).endswith(("conv2", "proj_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    norm: nn.GroupNorm = decoder.norm_out  # type: ignore[assignment]
    each = norm.num_channels // norm.num_groups
    if each < 2:
        raise ValueError("the last level needs at least 64 channels: with one a group, GroupNorm erases colours")
    conv_in: nn.Conv2d = decoder.conv_in  # type: ignore[assignment]
    conv_out: nn.Conv2d = decoder.conv_out  # type: ignore[assignment]
    narrow = shortcuts[0]  # the first change of width on the way out: where the constants come in
    for other in shortcuts:
        if other.weight.shape[0] == norm.num_channels:
            narrow = other
            break
    for k in range(6):
        value, constant = each * k, each * k + 1
        conv_in.weight[value] = 0
        conv_in.bias[value] = 0  # type: ignore[index]
        conv_in.weight[value, k % 3, 1, 1] = 1.0 if k < 3 else -1.0
        narrow.weight[constant] = 0
        narrow.bias[constant] = level  # type: ignore[index]
        for up in ups:
            if up.weight.shape[0] == norm.num_channels:
                up.weight[constant] = 0
                up.weight[constant, constant, 1, 1] = 1.0
        norm.bias[value] = 1.0
    for k in range(3):
        conv_out.weight[k] *= 0.1
        conv_out.bias[k] = 0  # type: ignore[index]
        conv_out.weight[k, each * k, 1, 1] = level / 2
        conv_out.weight[k, each * (k + 3), 1, 1] = -level / 2


def _name(root: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in root.named_modules() if module is wanted)


def quicken(decoder: nn.Module) -> None:
    """Give a decoder's layers their fast forward for training; parameters and results stay as they are."""

    def res_block(block: nn.Module) -> None:
        def forward(x: Tensor) -> Tensor:
            h = block.conv1(norm_silu(x, block.norm1.weight, block.norm1.bias))
            h = block.conv2(norm_silu(h, block.norm2.weight, block.norm2.bias))
            return (x if block.nin_shortcut is None else block.nin_shortcut(x)) + h

        block.forward = forward  # type: ignore[method-assign]

    def group_norm(layer: nn.Module) -> None:
        layer.forward = lambda x: norm_silu(x, layer.weight, layer.bias, False)  # type: ignore[method-assign]

    def attention(block: nn.Module) -> None:
        def forward(x: Tensor) -> Tensor:
            batch, channels, height, width = x.shape
            cells = block.qkv(block.norm(x)).permute(0, 2, 3, 1).reshape(batch, 1, height * width, 3 * channels)
            q, k, v = cells.chunk(3, dim=-1)
            out = F.scaled_dot_product_attention(q, k, v).view(batch, height, width, channels).permute(0, 3, 1, 2)
            return x + block.proj_out(out)

        block.forward = forward  # type: ignore[method-assign]

    for module in decoder.modules():
        if isinstance(module, nn.GroupNorm):
            group_norm(module)
        elif hasattr(module, "conv1") and hasattr(module, "norm2"):
            res_block(module)
        elif isinstance(module, plain._Attention):
            attention(module)


# -------------------------------------------------------------------------------------------------------- quantiser


class Scales:
    """Resizing among the square grids of a schedule by matrices; the last grid is that of the codes.

    Interpolation kernels compute the same, but the bicubic one and its gradient cost more than all the rest of
    tokenizing (80 of 240 ms of a training step on an H100).
    """

    def __init__(self, patch_nums: Sequence[int], device: torch.device) -> None:
        final = patch_nums[-1]
        self.edges = tuple(patch_nums)
        self.down = [area_matrix(n, final).to(device) for n in patch_nums]
        self.up = [bicubic_matrix(final, n).to(device) for n in patch_nums]

    def shrink(self, maps: Tensor, scale: int) -> Tensor:
        """Area resize `[B, d, P, P]` -> `[B, d, n, n]`."""
        return maps if self.edges[scale] == self.edges[-1] else self.down[scale] @ (maps @ self.down[scale].T)

    def enlarge(self, maps: Tensor, scale: int) -> Tensor:
        """Bicubic resize `[B, d, n, n]` -> `[B, d, P, P]`."""
        return maps if self.edges[scale] == self.edges[-1] else self.up[scale] @ (maps @ self.up[scale].T)


class Coding(NamedTuple):
    """codes: f_hat `[B, d, P, P]`. loss: scalar. tokens `[B * L]` and wanted `[B * L, d]`, scale after scale."""

    codes: Tensor
    loss: Tensor
    tokens: Tensor
    wanted: Tensor


def quantise(quantizer: plain.ResidualQuantizer, scales: Scales, features: Tensor, commitment: float = 0.25) -> Coding:
    """Code `features [B, d, P, P]` scale by scale, with VAR's loss.

    The phi convolutions draw every partial sum to the features, and the features, `commitment` times as hard, to it;
    the codebook follows by running means (`Codebook`). `wanted` is what each token had to code. Equal to
    `ResidualQuantizer.quantise` but for rounding.
    """
    goal = features.detach()
    codebook = quantizer.embedding.weight.detach()
    total = torch.zeros_like(goal)
    losses, tokens, wanted = [], [], []
    for s, n in enumerate(scales.edges):
        with torch.no_grad():
            small = scales.shrink(goal - total, s).permute(0, 2, 3, 1).reshape(-1, goal.shape[1])
            token = (codebook.square().sum(1) - 2 * small @ codebook.T).argmin(1)
        maps = F.embedding(token, codebook).view(-1, n, n, goal.shape[1]).permute(0, 3, 1, 2)
        total = total + quantizer.phi(scales.enlarge(maps, s), s)
        losses.append(commitment * F.mse_loss(features, total.detach()) + F.mse_loss(total, goal))
        tokens.append(token)
        wanted.append(small)
    return Coding(total, torch.stack(losses).mean(), torch.cat(tokens), torch.cat(wanted))


class Codebook:
    """A codebook that follows the running mean of what its codes are used for; idle codes move to where work is."""

    def __init__(self, weight: Tensor, decay: float = 0.97) -> None:
        self.weight, self.decay = weight, decay
        self.count = torch.ones(len(weight), device=weight.device)
        self.total = weight.detach().clone()

    def set(self, vectors: Tensor) -> None:
        """Start anew from `[V, d]`."""
        self.weight.copy_(vectors)
        self.count.fill_(1.0)
        self.total.copy_(vectors)

    def follow(self, coding: Coding) -> None:
        """Take in one batch. Fixed shapes and no host in between, so it can be part of a CUDA graph."""
        count = torch.zeros_like(self.count).index_add_(0, coding.tokens, torch.ones_like(coding.wanted[:, 0]))
        total = torch.zeros_like(self.total).index_add_(0, coding.tokens, coding.wanted)
        self.count.lerp_(count, 1 - self.decay)
        self.total.lerp_(total, 1 - self.decay)
        used = self.count > 1e-3
        self.weight.copy_(torch.where(used[:, None], self.total / self.count.clamp(min=1e-3)[:, None], self.weight))

    def revive(self, wanted: Tensor, share: float = 0.02) -> int:
        """Move codes used less than `share` of the average to random vectors of `wanted`; return how many."""
        idle = self.count < share * self.count.mean()
        pick = wanted[torch.randint(len(wanted), (len(idle),), device=wanted.device)]
        fresh = self.count.mean() * 0.2
        self.weight.copy_(torch.where(idle[:, None], pick, self.weight))
        self.count.copy_(torch.where(idle, fresh, self.count))
        self.total.copy_(torch.where(idle[:, None], pick * fresh, self.total))
        return int(idle.sum())

    def perplexity(self) -> float:
        """exp of the entropy of use: how many codes the pictures live on."""
        share = self.count / self.count.sum()
        return float(torch.exp(-(share * share.clamp(min=1e-12).log()).sum()))


def k_means(vectors: Tensor, count: int, rounds: int = 12) -> Tensor:
    """Return `[count, d]` centres of `[m, d]`; a centre that loses all its members restarts at a random vector."""

    def some(n: int) -> Tensor:
        return vectors[torch.randint(len(vectors), (n,), device=vectors.device)]

    centres = some(count)
    for _ in range(rounds):
        member = (centres.square().sum(1) - 2 * vectors @ centres.T).argmin(1)
        size = torch.bincount(member, minlength=count)
        total = torch.zeros_like(centres).index_add_(0, member, vectors)
        centres = torch.where(size[:, None] > 0, total / size[:, None].clamp(min=1), some(count))
    return centres


@torch.no_grad()
def residual_vectors(quantizer: plain.ResidualQuantizer, scales: Scales, features: Tensor) -> list[Tensor]:
    """Return what each scale would code if codes were exact, `[m, d]` a scale: where a codebook starts from."""
    rest, found = features, []
    for s in range(len(scales.edges)):
        small = scales.shrink(rest, s)
        found.append(small.permute(0, 2, 3, 1).reshape(-1, small.shape[1]))
        rest = rest - quantizer.phi(scales.enlarge(small, s), s)
    return found


# --------------------------------------------------------------------------------------------------- the VQVAE, whole


def demo_sizes(
    channels: Sequence[int] = (64, 32, 64, 128),
    latent_channels: int = 16,
    vocab: int = 1024,
    patch_nums: Sequence[int] = PATCHES,
    res_blocks: int = 0,
) -> VQVAESpec:
    """Return the sizes of the demo's VQVAE without an encoder: stride 8, 256 pixels to 32 x 32.

    The last level is wide because of its norm (`begin_as_enlarging`), the one before it narrow because the
    convolution that enlarges to 256 x 256 has its width.
    """
    return VQVAESpec(
        channels=tuple(channels),
        stem=channels[0],
        res_blocks=res_blocks,
        latent_channels=latent_channels,
        vocab=vocab,
        patch_nums=tuple(patch_nums),
        encoder=False,
    )


class PictureVq(nn.Module):
    """The backbone's VQVAE (decoder, codebook, phi) and the encoder it is trained with."""

    def __init__(self, spec: VQVAESpec) -> None:
        super().__init__()
        self.vae = VQVAE(spec)
        self.encoder = Encoder(spec.latent_channels)
        self.vae.quantize.embedding.weight.requires_grad_(False)  # it follows running means
        with torch.no_grad():
            for conv in self.vae.quantize.quant_resi.qresi_ls:  # begin as no smoothing at all: phi(h) = h
                nn.init.dirac_(conv.weight)
                nn.init.zeros_(conv.bias)
            nn.init.dirac_(self.vae.post_quant_conv.weight)
            nn.init.zeros_(self.vae.post_quant_conv.bias)  # type: ignore[arg-type]
        begin_as_enlarging(self.vae.decoder)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes `[B, d, P, P]` -> pictures in [-1, 1], not clamped."""
        return self.vae.decoder(self.vae.post_quant_conv(codes))


def load_picture_vq(path: Path, device: torch.device) -> PictureVq:
    """Return the frozen tokenizer in a checkpoint of train_vqvae.py."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    sizes = {name: tuple(value) if isinstance(value, list) else value for name, value in saved["sizes"].items()}
    model = PictureVq(VQVAESpec(**sizes))
    model.load_state_dict(saved["model"])
    return model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)


@torch.no_grad()
def tokenize(quantizer: plain.ResidualQuantizer, features: Tensor, corrupt: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return labels `[B, L]` int64 and transformer inputs `[B, L - 1, d]` fp32 of encoder features `[B, d, P, P]`.

    With `corrupt`, each picture gets a share of wrong tokens, uniform in [0, corrupt): one of the four next nearest
    codes of the nearest instead of it. What later scales see and have to code includes the mistake, so the transformer
    learns to repair what sampling will do to it (bitwise self-correction of the Infinity paper, for a codebook).
    """
    features = features.float()
    batch, channels = features.shape[:2]
    device, codebook = features.device, quantizer.embedding.weight
    square = codebook.square().sum(1)
    beside = (square - 2 * codebook @ codebook.T).topk(5, dim=1, largest=False).indices[:, 1:]  # [V, 4]
    share = corrupt * torch.rand(batch, 1, device=device)
    total = torch.zeros_like(features)
    labels, inputs = [], []
    scales = Scales(quantizer.spec.patch_nums, device)
    for s, n in enumerate(scales.edges):
        small = scales.shrink(features - total, s).permute(0, 2, 3, 1).reshape(-1, channels)
        token = (square - 2 * small @ codebook.T).argmin(1).view(batch, n * n)
        labels.append(token)
        other = beside[token, torch.randint(4, token.shape, device=device)]
        seen = torch.where(torch.rand(token.shape, device=device) < share, other, token)
        maps = F.embedding(seen.view(batch, n, n), codebook).permute(0, 3, 1, 2)
        total = total + quantizer.phi(scales.enlarge(maps, s), s)
        if s + 1 < len(scales.edges):
            inputs.append(scales.shrink(total, s + 1).flatten(2).transpose(1, 2))
    return torch.cat(labels, 1), torch.cat(inputs, 1)
