"""VAR: class-conditional next-scale transformer on ImageNet, with adaptive layer norms and a VQVAE.

The condition (a class) enters only through the first token and the adaptive norms, so every modulation is computed in
`prefix`, once per image. Parameter names are those of the released `var_d16/d20/d24/d30/d36.pth`.

Source: FoundationVision/VAR models/var.py, models/basic_var.py (commit 78b9539).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toprovar.backbones.base import (
    Backbone,
    BlockOutput,
    Constants,
    Context,
    EntropyMode,
    Prefix,
    Sampling,
    Spec,
    filter_logits,
    guide,
    gumbel,
    layer_norm,
)
from toprovar.backbones.checkpoint import State, block_count, load_strict, read_state_dict, require_kind, shape_of
from toprovar.backbones.resample import area_matrix, resample
from toprovar.backbones.vqvae import VQVAE, load_vqvae
from toprovar.errors import CheckpointError, InputError
from toprovar.kernels import entropy_attention

__all__ = ["PAPER_SAMPLING", "VAR", "VARSpec", "load_var"]

PAPER_SAMPLING = Sampling(guidance=1.5, top_k=900, top_p=0.96)
"""The setting of the paper's tables; the original demo uses guidance 4 and top_p 0.95."""

_MAX_LOG_SCALE = math.log(100.0)  # cosine attention: the learned log multiplier of q is clamped here


@dataclass(frozen=True)
class VARSpec(Spec):
    """Sizes of a VAR. `patch_nums` are the sides of its square grids."""

    patch_nums: tuple[int, ...] = ()
    classes: int = 1000
    shared_aln: bool = False
    """One AdaLN projection for all layers plus a table per layer (d36), instead of a projection per layer."""
    cosine: bool = True
    """L2-normalised q and k with a learned multiplier per head."""

    @classmethod
    def of(
        cls,
        *,
        depth: int,
        width: int,
        heads: int,
        patch_nums: Sequence[int],
        vocab: int = 4096,
        latent_channels: int = 32,
        stride: int = 16,
        classes: int = 1000,
        ffn_width: int | None = None,
        shared_aln: bool = False,
        cosine: bool = True,
    ) -> VARSpec:
        """Fills in what follows from the architecture. `stride` is the pixels per cell of the VQVAE's code map."""
        last = patch_nums[-1]
        return cls(
            backbone="var",
            depth=depth,
            width=width,
            heads=heads,
            head_dim=width // heads,
            ffn_width=4 * width if ffn_width is None else ffn_width,
            vocab=vocab,
            grids=tuple((n, n) for n in patch_nums),
            latent_channels=latent_channels,
            latent_grid=(last, last),
            image_size=(last * stride, last * stride),
            attention_scale=1.0 if cosine else 0.25 / math.sqrt(width // heads),
            patch_nums=tuple(patch_nums),
            classes=classes,
            shared_aln=shared_aln,
            cosine=cosine,
        )


def _levels(spec: Spec) -> Tensor:
    """The scale of every token, `[1, L]` int64: `lvl_1L` of the file."""
    return torch.tensor([[scale for scale, tokens in enumerate(spec.tokens) for _ in range(tokens)]])


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(x.to(layer.weight.dtype), layer.weight, layer.bias)


class _AdaLinear(nn.Sequential):
    """Condition -> `chunks` modulation vectors: SiLU, Linear; the Linear is `1` in the file."""

    def __init__(self, width: int, chunks: int):
        super().__init__(nn.SiLU(), nn.Linear(width, chunks * width))
        self.chunks = chunks

    def forward(self, condition: Tensor) -> Tensor:
        """`[R, C]` -> `[chunks, R, C]` fp32."""
        linear = self[1]
        assert isinstance(linear, nn.Linear)
        return _linear(F.silu(condition.float()), linear).float().unflatten(-1, (self.chunks, -1)).transpose(0, 1)


class _SelfAttention(nn.Module):
    zero_k_bias: Tensor

    def __init__(self, spec: VARSpec):
        super().__init__()
        width = spec.width
        self.heads, self.scale = spec.heads, spec.attention_scale
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, spec.heads, 1, 1), math.log(4.0))) if spec.cosine else None
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`x [n, R, C]` -> q, k, v `[n, R, H, D]` in the dtype of the weights, ready for softmax(scale q.k) v."""
        weight = self.mat_qkv.weight
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias)).to(weight.dtype)
        q, k, v = F.linear(x.to(weight.dtype), weight, bias).unflatten(-1, (3, self.heads, -1)).unbind(2)
        if self.scale_mul_1H11 is not None:
            multiplier = self.scale_mul_1H11.float().clamp_max(_MAX_LOG_SCALE).exp().reshape(self.heads, 1)
            q = (F.normalize(q.float(), dim=-1) * multiplier).to(v.dtype)
            k = F.normalize(k.float(), dim=-1).to(v.dtype)
        return q, k, v

    def project(self, out: Tensor) -> Tensor:
        """`out [n, R, H, D]` -> `[n, R, C]`."""
        return _linear(out.flatten(-2), self.proj)


class _FFN(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return _linear(F.gelu(_linear(x, self.fc1), approximate="tanh"), self.fc2)


class _Block(nn.Module):
    """Self-attention and FFN, both gated and modulated. The residual stream is fp32, the matrices any dtype."""

    def __init__(self, spec: VARSpec):
        super().__init__()
        self.attn = _SelfAttention(spec)
        self.ffn = _FFN(spec.width, spec.ffn_width)
        if spec.shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, spec.width) / spec.width**0.5)
        else:
            self.ada_lin = _AdaLinear(spec.width, 6)

    def modulation(self, condition: Tensor, shared: Tensor | None) -> Tensor:
        """gamma1, gamma2, scale1, scale2, shift1, shift2: `condition [R, C]` -> `[6, R, C]` fp32."""
        if shared is None:
            return self.ada_lin(condition)
        return shared + self.ada_gss.float().reshape(6, 1, -1)

    def forward(
        self,
        x: Tensor,
        context: Context,
        past_k: Tensor,
        past_v: Tensor,
        rope: Tensor | None = None,
        entropy: EntropyMode = "none",
    ) -> BlockOutput:
        """See `Backbone`; `context["modulation"]` is `[6, R, C]`; VAR has no rope."""
        gamma1, gamma2, scale1, scale2, shift1, shift2 = context["modulation"].unbind(0)
        q, k, v = self.attn.qkv(layer_norm(x) * (1 + scale1) + shift1)
        attended = entropy_attention(q, past_k, past_v, k, v, scale=self.attn.scale, entropy=entropy)
        x = x + gamma1 * self.attn.project(attended.out)
        x = x + gamma2 * self.ffn(layer_norm(x) * (1 + scale2) + shift2)
        return BlockOutput(x, k, v, attended.entropy)

    def forward_training(self, x: Tensor, modulation: Tensor, mask: Tensor) -> Tensor:
        """All scales at once: `x [L, B, C]`, `modulation [6, B, C]`, `mask [L, L]` True where a query may look."""
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation.unbind(0)
        q, k, v = (t.permute(1, 2, 0, 3) for t in self.attn.qkv(layer_norm(x) * (1 + scale1) + shift1))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.attn.scale)
        x = x + gamma1 * self.attn.project(out.permute(2, 0, 1, 3))
        return x + gamma2 * self.ffn(layer_norm(x) * (1 + scale2) + shift2)


class _HeadNorm(nn.Module):
    """Holds the projection that modulates the input of the head, under its name in the file."""

    def __init__(self, width: int):
        super().__init__()
        self.ada_lin = _AdaLinear(width, 2)


class _Head(nn.Linear):
    def forward(self, x: Tensor, context: Context) -> Tensor:  # type: ignore[override]
        """`x [N, R, C]`, `context["head_modulation"] [2, R, C]` -> logits `[N, R, V]` fp32."""
        scale, shift = context["head_modulation"].unbind(0)
        return _linear(layer_norm(x) * (1 + scale) + shift, self).float()


class VAR(Backbone):
    """The transformer, under the parameter names of its file, and its VQVAE as `vae` (another file)."""

    spec: VARSpec
    vae: VQVAE
    lvl_1L: Tensor

    def __init__(self, spec: VARSpec, vae: VQVAE, sampling: Sampling = PAPER_SAMPLING):
        super().__init__()
        if spec.width % spec.heads:
            raise InputError(f"VAR of width {spec.width} with {spec.heads} heads: the width must be their multiple")
        self.spec = spec
        self.sampling = sampling
        width, tokens = spec.width, sum(spec.tokens)
        self.word_embed = nn.Linear(spec.latent_channels, width)
        self.class_emb = nn.Embedding(spec.classes + 1, width)  # the last is the unconditional class
        self.pos_start = nn.Parameter(torch.zeros(1, spec.tokens[0], width))
        self.pos_1LC = nn.Parameter(torch.zeros(1, tokens, width))
        self.lvl_embed = nn.Embedding(spec.scales, width)
        self.register_buffer("lvl_1L", _levels(spec))
        if spec.shared_aln:
            self.shared_ada_lin = _AdaLinear(width, 6)
        self.blocks = nn.ModuleList(_Block(spec) for _ in range(spec.depth))
        self.head_nm = _HeadNorm(width)
        self.head = _Head(width, spec.vocab)
        self.vae = vae

    @property
    def dtype(self) -> torch.dtype:
        return self._layers[0].attn.mat_qkv.weight.dtype

    def set_precision(self, dtype: torch.dtype, *, decoder: torch.dtype | None = None) -> VAR:
        """Casts the matrices of the blocks and of the head in place (and the VQVAE if asked); the rest stays fp32."""
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            if _is_matrix(name):
                tensor.data = tensor.data.to(dtype)
        if decoder is not None:
            self.vae.to(decoder)
        return self

    @property
    def _layers(self) -> list[_Block]:
        return cast("list[_Block]", list(self.blocks))

    # ------------------------------------------------------------------------- once per image

    def prefix(self, *condition: Tensor) -> Prefix:
        """`labels [B]` int -> x0 `[n_0, R, C]`, modulation `[depth, 6, R, C]` and head_modulation `[2, R, C]`, fp32."""
        (labels,) = condition
        rows = labels
        if self.sampling.guided:
            rows = torch.cat((labels, torch.full_like(labels, self.spec.classes)))
        class_vectors = self.class_emb(rows).float()
        x0 = class_vectors + self.pos_start.float().transpose(0, 1)  # [n_0, R, C]
        return Prefix(x0 + self._position(0).transpose(0, 1), self._modulation(class_vectors))

    def _position(self, scale: int) -> Tensor:
        """Position and level embedding of a scale, `[1, N, C]` fp32."""
        start = sum(self.spec.tokens[:scale])
        position = self.pos_1LC[:, start : start + self.spec.tokens[scale]].float()
        return position + self.lvl_embed.weight[scale].float()

    def _modulation(self, class_vectors: Tensor) -> dict[str, Tensor]:
        shared = self.shared_ada_lin(class_vectors) if self.spec.shared_aln else None
        layers = [block.modulation(class_vectors, shared) for block in self._layers]
        return {"modulation": torch.stack(layers), "head_modulation": self.head_nm.ada_lin(class_vectors)}

    def layer_context(self, layer: int, context: Context) -> dict[str, Tensor]:
        return {"modulation": context["modulation"][layer]}

    # ------------------------------------------------------------------------ once per scale

    def scale_constants(self, scale: int, following: int | None = None) -> dict[str, Tensor]:
        """up_rows, up_cols `[P, n]`, phi `[phis]`, guidance `[2]` (or `[1]`); and, unless the last scale,
        down_rows, down_cols `[n', P]`, next_position `[N', 1, C]`."""
        spec = self.spec
        constants = self.vae.quantize.scale_constants(scale)
        strength = self.sampling.at("guidance", scale) * scale / max(spec.scales - 1, 1)
        inverse = 1.0 / self.sampling.at("temperature", scale)
        weights = [1.0 + strength, -strength] if self.sampling.guided else [1.0]
        constants["guidance"] = torch.tensor([weight * inverse for weight in weights])
        following = scale + 1 if following is None else following
        if following < spec.scales:
            down = area_matrix(spec.patch_nums[following], spec.patch_nums[-1])
            constants |= {"down_rows": down, "down_cols": down.clone()}
            constants["next_position"] = self._position(following).detach().transpose(0, 1)
        return {name: tensor.to(self.device).contiguous() for name, tensor in constants.items()}

    def sample(self, logits: Tensor, noise: Tensor | None, constants: Constants) -> Tensor:
        guided = filter_logits(guide(logits, constants["guidance"]), self.sampling.top_k, self.sampling.top_p)
        if noise is not None:
            guided = guided + gumbel(noise)
        return guided.argmax(-1).transpose(0, 1).to(torch.int32)

    def accumulate(self, tokens: Tensor, codes: Tensor, constants: Constants) -> Tensor:
        return self.accumulate_vectors(self.vae.quantize.embedding(tokens), codes, constants)

    def accumulate_vectors(self, vectors: Tensor, codes: Tensor, constants: Constants) -> Tensor:
        return self.vae.quantize.add_codes(vectors, codes, constants)

    def mixed_codes(self, scale: int, logits: Tensor, gumbel_noise: Tensor) -> Tensor:
        """What `more_smooth` of the original gives each token: a mixture of codes instead of the code drawn.

        Args:
            logits: `[N, R, V]`, conditional rows first; `[N, B, V]` if guidance is already applied.
            gumbel_noise: Gumbel(0, 1), `[N, B, V]`.

        Returns: `[B, N, latent_channels]`.
        """
        ratio = scale / max(self.spec.scales - 1, 1)
        temperature = max(0.27 * (1 - 0.95 * ratio), 0.005)
        if logits.shape[1] != gumbel_noise.shape[1]:
            logits = guide(logits, self.scale_constants(scale)["guidance"])
        filtered = filter_logits(logits, self.sampling.top_k, self.sampling.top_p)
        weights = ((filtered * (1 + ratio) + gumbel_noise) / temperature).softmax(-1)
        return (weights @ self.vae.quantize.embedding.weight.float()).transpose(0, 1)

    def next_map(self, codes: Tensor, constants: Constants) -> Tensor:
        """The code map shrunk to the grid of the next scale, `[B, latent_channels, n', n']`."""
        return resample(codes, constants["down_rows"], constants["down_cols"], "area")

    def next_input(self, codes: Tensor, constants: Constants) -> Tensor:
        vectors = self.next_map(codes, constants).flatten(2).permute(2, 0, 1)  # [N', B, channels]
        x = _linear(vectors, self.word_embed).float() + constants["next_position"]
        return torch.cat((x, x), dim=1) if self.sampling.guided else x

    # ------------------------------------------------------------------------------ training

    def forward_training(self, labels: Tensor, x_wo_first: Tensor) -> Tensor:
        """All scales at once, each seeing itself and those before it: what training optimises.

        Args:
            labels: `[B]`; `spec.classes` is the unconditional class.
            x_wo_first: `vae.quantize.teacher_input(tokens)`, `[B, L - n_0, latent_channels]`.

        Returns: logits `[B, L, V]` fp32.
        """
        class_vectors = self.class_emb(labels).float()
        context = self._modulation(class_vectors)
        first = class_vectors + self.pos_start.float().transpose(0, 1)
        rest = _linear(x_wo_first.transpose(0, 1), self.word_embed).float()
        level = self.lvl_1L[0]
        position = self.pos_1LC[0].float() + self.lvl_embed(level).float()
        x = torch.cat((first, rest)) + position[:, None]
        mask = level[:, None] >= level[None]
        for layer, block in enumerate(self._layers):
            x = block.forward_training(x, context["modulation"][layer], mask)
        return self.head(x, context).transpose(0, 1)


# ----------------------------------------------------------------------------------- loading

_RELEASED_SCHEDULES = {  # (scales, tokens) -> patch_nums, for files without `lvl_1L`
    (10, 680): (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    (10, 2240): (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
}


def infer_spec(
    state: State, path: str | Path, *, heads: int | None = None, patch_nums: Sequence[int] | None = None
) -> VARSpec:
    """Sizes of a VAR from the shapes in its state dict.

    `heads` is needed only without cosine attention (default: heads of 64), `patch_nums` only where the file has no
    `lvl_1L` and the schedule is none of the released ones. The image size is that of a VQVAE of stride 16.
    """
    width, latent = shape_of(state, "word_embed.weight", path, 2)
    scales = shape_of(state, "lvl_embed.weight", path, 2)[0]
    tokens = shape_of(state, "pos_1LC", path, 3)[1]
    cosine = "blocks.0.attn.scale_mul_1H11" in state
    if cosine:
        heads = shape_of(state, "blocks.0.attn.scale_mul_1H11", path, 4)[1]
    heads = width // 64 if heads is None else heads
    if not heads or width % heads:
        raise CheckpointError(f"{path}: width {width} does not divide into {heads} heads: give the number of heads")
    if patch_nums is None and "lvl_1L" in state:
        patch_nums = [math.isqrt(count) for count in torch.bincount(state["lvl_1L"].flatten().long()).tolist()]
    if patch_nums is None:
        patch_nums = _RELEASED_SCHEDULES.get((scales, tokens))
    if patch_nums is None or len(patch_nums) != scales or sum(n * n for n in patch_nums) != tokens:
        raise CheckpointError(
            f"{path}: the schedule {patch_nums} does not give the file's {tokens} tokens in {scales} scales: "
            "give its patch_nums"
        )
    return VARSpec.of(
        depth=block_count(state, r"blocks\.(\d+)\."),
        width=width,
        heads=heads,
        patch_nums=patch_nums,
        vocab=shape_of(state, "head.weight", path, 2)[0],
        latent_channels=latent,
        classes=shape_of(state, "class_emb.weight", path, 2)[0] - 1,
        ffn_width=shape_of(state, "blocks.0.ffn.fc1.weight", path, 2)[0],
        shared_aln="shared_ada_lin.1.weight" in state,
        cosine=cosine,
    )


# The multipliers of q are logarithms up to ln 100: in bf16 one would be off by 2%. Tables are small and feed fp32 sums.
_MATRIX = re.compile(
    r"(blocks\.\d+\.(attn\.(mat_qkv|proj)|ffn\.fc[12]|ada_lin\.1)|shared_ada_lin\.1|head_nm\.ada_lin\.1|head)\."
)


def _is_matrix(name: str) -> bool:
    """Of the tensors that take the model's dtype: matrices and their biases."""
    return _MATRIX.match(name) is not None


def ignorable(key: str) -> bool:
    """Keys of a released file that generation does not need: the training mask."""
    return key == "attn_bias_for_masking"


def load_var(
    checkpoint: str | Path,
    vae: str | Path,
    *,
    sampling: Sampling = PAPER_SAMPLING,
    heads: int | None = None,
    patch_nums: Sequence[int] | None = None,
    phi_ratio: float = 0.5,
    encoder: bool = False,
    dtype: torch.dtype = torch.float32,
    vae_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> VAR:
    """Loads `var_d*.pth` and `vae_ch160v4096z32.pth`, or safetensors with the same names, in evaluation mode.

    Args:
        heads, patch_nums: see `infer_spec`.
        phi_ratio: `quant_resi` of the original, which no file holds.
        dtype: of the matrices (`VAR.set_precision`); the rest of the transformer is fp32. vae_dtype: of the VQVAE.
        encoder: keep the VQVAE's encoder, which only training needs.

    Raises:
        CheckpointError: a file that is missing, truncated, unsafe, of another model, or incomplete; two files that do
            not belong together.
    """
    state = read_state_dict(checkpoint, wrappers=(("trainer", "var_wo_ddp"),))
    require_kind(state, "var", checkpoint)
    spec = infer_spec(state, checkpoint, heads=heads, patch_nums=patch_nums)
    state.setdefault("lvl_1L", _levels(spec))
    vae_state = read_state_dict(vae, wrappers=(("trainer", "vae_local"),))
    vqvae = load_vqvae(
        vae_state, vae, spec.patch_nums, phi_ratio=phi_ratio, encoder=encoder, dtype=vae_dtype, device=device
    )
    for name in ("vocab", "latent_channels"):
        if getattr(spec, name) != getattr(vqvae.spec, name):
            raise CheckpointError(
                f"{vae}: {name} is {getattr(vqvae.spec, name)}, but {getattr(spec, name)} in {checkpoint}: "
                "give the VQVAE that the transformer was trained with"
            )
    size = spec.patch_nums[-1] * vqvae.spec.stride
    spec = dataclasses.replace(spec, image_size=(size, size))
    with torch.device("meta"):
        model = VAR(spec, vqvae, sampling)
    load_strict(
        model,
        state,
        checkpoint,
        ignore=ignorable,
        elsewhere=("vae.",),
        dtype=lambda name: dtype if _is_matrix(name) else torch.float32,
        device=device,
    )
    return model.eval().requires_grad_(False)
