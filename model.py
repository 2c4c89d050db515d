"""
FELA: a causal language model without softmax attention. The whole model, in plain PyTorch.

Blocks with two kinds of mixer alternate, three to one (pattern 'SSSL'); a third kind is the baseline:
    S  FNO: a causal FIR filter of M taps for every channel. FFT over a sequence, ring buffer token by token.
    L  GLA: gated linear attention, a recurrent state of H x K x V numbers. Chunks over a sequence.
    A  softmax attention with rotary positions and a KV cache, for comparisons and hybrids.
Letters in shape comments:
    B batch   T time   C channels (n_embd)   M taps (n_modes)   N tokens in a line   n chunks or blocks
    H heads   K key width of a head   V value width of a head   c tokens in a chunk
Papers: FELA (ACML 2026); Fourier Neural Operator (Li et al. 2021); GLA (Yang et al. 2024, arXiv:2312.06635);
overlap-save (Oppenheim & Schafer, ch. 8); SwiGLU (Shazeer 2020); RoPE (Su et al. 2021); Muon (Jordan 2024).
"""

import functools
import hashlib
import json
import math
import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from configurator import sha256_of, write_whole


@dataclass(frozen=True)
class FELAConfig:
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12  # of A layers
    gla_heads: int = 1  # of L layers, whose state is C * C / gla_heads numbers: few, wide heads remember more
    n_embd: int = 768  # C
    n_modes: int = 512  # M, taps of S layers
    pattern: str = 'SSSL'  # S: FNO, L: GLA, A: attention; repeated over the layers
    chunk_size: int = 128  # of L layers; a speed knob that never changes the function
    mlp_hidden: int = 0  # 0: 2 * n_embd

    def __post_init__(self):
        for name, value in vars(self).items():
            if name != 'pattern' and value < (0 if name == 'mlp_hidden' else 1):
                raise ValueError(f'{name}={value}: expected a positive number')
            if name in ('n_head', 'gla_heads') and self.n_embd % value:
                raise ValueError(f'n_embd={self.n_embd}: expected a multiple of {name}={value}')
        if not self.pattern or set(self.pattern) - set('SLA'):
            raise ValueError(f'pattern={self.pattern!r}: expected letters out of S, L and A')


def recompute(f):
    """f, keeping only its arguments for backward, which computes what lies between again"""
    return functools.partial(checkpoint, f, use_reentrant=False, preserve_rng_state=False)


# -- S: causal FIR filters, by FFT or as matrix products

def causal_fir(x, taps, past=None):
    """y[b,t,c] = sum_{j<M} taps[j,c] x[b,t-j,c]: a filter of M taps for every channel.

    x (B,T,C); taps (M,C); past (B,M-1,C): the inputs just before x, None means zeros. Returns y like x.
    By FFT in fp32 (fp64 for fp64 taps), O(T log M); in bf16 on a GPU by matrix products, faster there."""
    if x.dim() != 3 or taps.dim() != 2 or taps.shape[1] != x.shape[2]:
        raise ValueError(f'expected x (B,T,C) and taps (M,C), got {tuple(x.shape)} and {tuple(taps.shape)}')
    (B, T, C), M = x.shape, len(taps)
    past = x.new_zeros(B, M - 1, C) if past is None else past
    if past.shape != (B, M - 1, C):
        raise ValueError(f'expected past (B,M-1,C) = {(B, M - 1, C)}, got {tuple(past.shape)}')
    products = x.is_cuda and x.dtype == torch.bfloat16 and M % MatmulFIR.m == 0
    return (matmul_fir if products else fft_fir)(x, taps, past)


@torch.compiler.disable  # torch.compile has no complex numbers
@recompute
def fft_fir(x, taps, past):
    """Overlap-save. A product of spectra is a circular filter: the first M-1 outputs of a block wrap around.
    They are dropped, so blocks overlap by M-1 inputs."""
    (B, T, C), M = x.shape, len(taps)
    taps = taps if taps.dtype == torch.float64 else taps.float()
    n = M * min(5, -(-(T + M - 1) // M))  # inputs in a block: all of a short T, else 5M
    step = n - M + 1  # outputs in a block
    inputs = torch.cat((past, x), 1).to(taps.dtype).transpose(1, 2)  # (B,C,M-1+T)
    blocks = F.pad(inputs, (0, -T % step)).unfold(2, n, step)  # (B,C,T/step,n)
    y = torch.fft.irfft(torch.fft.rfft(blocks) * torch.fft.rfft(taps.t(), n=n).unsqueeze(1), n=n)
    return y[..., M - 1:].flatten(2)[..., :T].transpose(1, 2).to(x.dtype)


class MatmulFIR(torch.autograd.Function):
    """x (C,N), taps (C,M) -> y (C,N-M). m outputs in a row depend on M+m inputs, so all n blocks of them are
    windows (C,n,M+m) @ band (C,M+m,m), views that overlap themselves, of inputs and of taps. Matrix products
    written by torch.compile read them as they are; cuBLAS would have them copied, M/m times larger."""
    m = 64
    options = {'max_autotune': True, 'max_autotune_gemm_backends': 'TRITON'}
    compiled = functools.cache(functools.partial(torch.compile, options=options))  # for one length, then any

    @staticmethod
    def product(x, band, m=m):
        """x (C,N), band (C,M+2m-1) -> (C,N-M): in block k, y[k m + m-1-a] = sum_i x[k m + i] band[i + a]"""
        (C, N), M = x.shape, band.shape[1] - 2 * m + 1
        windows = x.as_strided((C, (N - M) // m, M + m), (N, m, 1))
        return torch.bmm(windows, band.as_strided((C, M + m, m), (M + 2 * m - 1, 1, 1))).flip(2).flatten(1)

    @staticmethod
    def correlate(x, dy, m=m):
        """x (C,N), dy (C,N-M) -> (C,M): the gradient of tap j is the sum of dy[t] x[t - j]"""
        (C, N), M = x.shape, x.shape[1] - dy.shape[1]
        windows = x.as_strided((C, (N - M) // m, M + m), (N, m, 1))
        pairs = torch.bmm(dy.reshape(C, -1, m).mT, windows)  # (C,m,M+m): output a with input i = M + a - j
        return pairs.as_strided((C, m, M), (m * (M + m), M + m + 1, 1), 1).sum(1).flip(1)  # over diagonals

    @staticmethod
    def forward(ctx, x, taps, m=m):
        ctx.save_for_backward(x, taps)
        return MatmulFIR.compiled(MatmulFIR.product)(x, F.pad(taps.flip(1), (m, m - 1)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, m=m):
        (x, taps), M = ctx.saved_tensors, ctx.saved_tensors[1].shape[1]
        dx = MatmulFIR.compiled(MatmulFIR.product)(F.pad(dy, (M, M)), F.pad(taps, (m - 1, m)))  # back in time
        return dx, MatmulFIR.compiled(MatmulFIR.correlate)(x, dy)


apply_fir = torch.compiler.disable(MatmulFIR.apply)  # compiled apart from the rest


def matmul_fir(x, taps, past):
    """The rows as one line, each after its past. The M outputs between two rows belong to neither."""
    T, M = x.shape[1], len(taps)
    x = torch.cat((past.to(x.dtype), x), 1).permute(2, 0, 1)
    x = F.pad(x, (1, -T % MatmulFIR.m)).contiguous()  # (C,B,M+T), T now a multiple of m
    y = F.pad(apply_fir(x.flatten(1), taps.t().to(x.dtype)), (0, M))
    return y.view(x.shape)[..., :T].permute(1, 2, 0)


# -- L: gated linear attention

def gated_linear_attention(q, k, v, log_decay, state=None, chunk_size=128, floor=-20.0):
    """Gated linear attention (arXiv:2312.06635, eq. 3), exact for every gate and every chunk size:

        S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T,    o_t = q_t S_t        (no hidden scale)

    q, k, log_decay (B,H,T,K); v (B,H,T,V); state (B,H,K,V) fp32, None means zeros; floor <= log_decay <= 0.
    -> o (B,H,T,V) like v, the state after the last token. Matrix products are in the dtype of v; gates, sums
    and the state in fp32 (fp64 for fp64). A log_decay below floor acts as floor: e^-20 is below fp32
    rounding, and who knows a higher bound may say so."""
    if k.shape != q.shape or log_decay.shape != q.shape or v.shape[:3] != q.shape[:3]:
        shapes = ', '.join(str(tuple(t.shape)) for t in (q, k, log_decay, v))
        raise ValueError(f'expected q, k, log_decay (B,H,T,K) and v (B,H,T,V), got {shapes}')
    dtype = torch.promote_types(v.dtype, torch.float32)
    if state is None:
        state = v.new_zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=dtype)
    # exponents stay within +-40, far from overflow; a chunk_size above 128 acts as 128, longer are slower
    c = min(chunk_size, q.shape[2], 128, max(1, int(80 / -floor)))
    with torch.autocast(v.device.type, enabled=False):  # in fp32 for fp16, which does not hold e^40
        o, state = _gla(q, k, v.float() if v.dtype == torch.float16 else v, log_decay, state, c, floor)
    return o.to(v.dtype), state


def gla_step(q, k, v, log_decay, S, *_):
    """The recurrence itself for one token, T = 1; advances S (B,H,K,V) in place"""
    S.mul_(log_decay.exp().mT).addcmul_(k.float().mT, v.float())
    return (q.float().mT * S).sum(2, keepdim=True), S


@recompute
def _gla(q, k, v, log_decay, S, c, floor):
    T, dtype = q.shape[2], v.dtype
    q, k, v, g = (torch.unflatten(F.pad(t, (0, 0, 0, -T % c)), 2, (-1, c)) for t in (q, k, v, log_decay))
    b = g.to(S.dtype).clamp(floor, 0).cumsum(3)  # (B,H,n,c,K) log decay from before the chunk to t
    middle, end = b[..., (c - 1) // 2, None, :], b[..., -1:, :]
    # token t sees j <= t with decay e^(b_t - b_j), factored about the middle, where neither factor overflows
    q, k = q * (b - middle).exp(), k * (middle - b).exp()
    seen = (q @ k.mT).tril()  # in fp32: in the gradient of the gates nearly everything cancels
    q, k, seen = q.to(dtype), k.to(dtype), seen.to(dtype)
    added, states = (k.mT @ v) * (end - middle).exp().mT, []  # (B,H,n,K,V)
    for a, to_middle, to_end in zip(added.unbind(2), middle.exp().mT.unbind(2), end.exp().mT.unbind(2)):
        states.append(S * to_middle)
        S = S * to_end + a
    o = seen @ v + q @ torch.stack(states, 2).to(dtype)
    return o.flatten(2, 3)[:, :, :T], S


# -- mixers: forward over a sequence, step over one token (B,1,C); state in, state out (None: none is wanted)

class FNOMixer(nn.Module):
    """S: y = FIR(u) * silu(z). Taps are learned numbers times a fixed exponential window for each channel,
    whose time constants run from one token to M, plus a direct path at lag 0.
    State: ring (B,M,C), the last M inputs; pos (1,), slot of the oldest, the next to go; taps (M,C)."""
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.in_proj = nn.Linear(C, 2 * C, bias=False)  # u, z
        self.out_proj = nn.Linear(C, C, bias=False)
        self.taps = nn.Parameter(torch.empty(config.n_modes, C))
        self.direct = nn.Parameter(torch.empty(C))

    def window(self):
        """(M,C) fp32, computed at every use: a buffer would be rounded with the weights"""
        (M, C), device = self.taps.shape, self.taps.device
        tau = float(M) ** torch.linspace(0, 1, C, device=device)
        return torch.exp(-torch.arange(M, device=device).unsqueeze(1) / tau)

    def effective_taps(self):
        taps = self.taps.float() * self.window()  # (M,C)
        return torch.cat((taps[:1] + self.direct.float(), taps[1:]))

    def init_state(self, batch_size):
        w, taps = self.out_proj.weight, self.effective_taps()
        return w.new_zeros(batch_size, *taps.shape), w.new_zeros(1, dtype=torch.long), taps.to(w.dtype)

    def forward(self, x, state=None):
        u, z = self.in_proj(x).chunk(2, -1)  # (B,T,C)
        past, M = None, len(self.taps)
        if state is not None:
            ring, pos, taps = state
            past = ring[:, (pos + torch.arange(M, device=x.device)) % M]  # oldest first
            ring = torch.cat((past, u), 1)[:, -M:].to(ring.dtype, copy=True)  # a view would keep all of u
            past, state = past[:, 1:], (ring, torch.zeros_like(pos), taps)
        y = causal_fir(u, self.effective_taps(), past)
        return self.out_proj(y * F.silu(z)), state

    def step(self, x, state):
        u, z = self.in_proj(x).chunk(2, -1)  # (B,1,C)
        ring, pos, taps = state
        ring.index_copy_(1, pos, u.to(ring.dtype))
        lag = (pos - torch.arange(len(taps), device=x.device)) % len(taps)  # how long ago a slot was written
        pos.add_(1).remainder_(len(taps))
        return self.out_proj((ring * taps[lag]).sum(1, keepdim=True) * F.silu(z)), state


class GLAMixer(nn.Module):
    """L: q, k and v pass a short causal filter and SiLU, then gated linear attention, whose output is
    normalised per head and gated by silu(z). The forget gate is of low rank, and its log is bounded below.
    State: S (B,H,K,V) fp32; the last inputs of the short filter (B,3,3C)."""
    floor = -0.625  # of log_decay: a token keeps over half of the state, a chunk of 128 stays within e^+-40
    rank = 16  # of the gate projection
    width = 4  # taps of the short filter

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head, self.chunk_size = config.gla_heads, config.chunk_size
        self.in_proj = nn.Linear(C, 4 * C, bias=False)  # q, k, v, z
        self.short_taps = nn.Parameter(torch.empty(self.width, 3 * C))
        self.decay_down = nn.Linear(C, self.rank, bias=False)
        self.decay_up = nn.Linear(self.rank, C)
        self.out_proj = nn.Linear(C, C, bias=False)
        # A first token's output is v (q.k): normalised, the sign of q.k, whose gradient is a spike.
        # eps, 1% of that output's variance at initialisation if silu(x) were x / 2, keeps it low.
        self.eps = 0.01 * (C // self.n_head) * (0.02 ** 2 * C / 4) ** 3

    def init_state(self, batch_size):
        w, H = self.out_proj.weight, self.n_head
        S = w.new_zeros(batch_size, H, len(w) // H, len(w) // H, dtype=torch.float32)
        return S, w.new_zeros(batch_size, self.width - 1, 3 * len(w))

    def forward(self, x, state=None, attend=gated_linear_attention):
        (B, T, C), H = x.shape, self.n_head
        S, past = state or self.init_state(B)
        qkv, z = self.in_proj(x).split((3 * C, C), -1)
        inputs = torch.cat((past.to(qkv.dtype), qkv), 1)  # (B,3+T,3C)
        qkv = sum(tap * inputs[:, j:j + T] for j, tap in enumerate(self.short_taps.flip(0)))
        qkv = F.silu(qkv).to(z.dtype)
        log_decay = self.floor * torch.sigmoid(self.decay_up(self.decay_down(x)).float())
        qkvg = (t.view(B, T, H, -1).transpose(1, 2) for t in (*qkv.chunk(3, -1), log_decay))  # (B,H,T,K)
        o, S = attend(*qkvg, S, self.chunk_size, self.floor)  # (B,H,T,V)
        o = F.rms_norm(o.float(), o.shape[-1:], eps=self.eps).transpose(1, 2).flatten(2).to(z.dtype)
        return self.out_proj(o * F.silu(z)), (S, inputs[:, T:].to(past.dtype, copy=True)) if state else None

    def step(self, x, state):
        y, (_, past) = self(x, state, gla_step)
        state[1].copy_(past)
        return y, state


class AttentionMixer(nn.Module):
    """A, the baseline: causal softmax attention with rotary positions.
    State, the KV cache: k and v (B,H,capacity,K), tokens in it."""
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.in_proj = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)  # q, k, v
        self.out_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def init_state(self, batch_size):
        w, H = self.out_proj.weight, self.n_head
        return w.new_zeros(batch_size, H, 0, len(w) // H), w.new_zeros(batch_size, H, 0, len(w) // H), 0

    def forward(self, x, state=None):
        (B, T, C), K = x.shape, x.shape[2] // self.n_head
        *caches, n = state or (None, None, 0)
        qkv = self.in_proj(x).view(B, T, 3, self.n_head, K).permute(2, 0, 3, 1, 4)  # (3,B,H,T,K)
        inv_freq = 10000.0 ** -(torch.arange(0, K, 2, device=x.device).float() / K)
        angle = torch.outer(torch.arange(n, n + T, device=x.device), inv_freq)  # (T,K/2) fp32
        cos, sin, (a, b) = angle.cos(), angle.sin(), qkv[:2].chunk(2, -1)
        q, k, v = *torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(qkv.dtype), qkv[2]  # RoPE
        if state:
            if n + T > caches[0].shape[2]:  # full: at least double it
                caches = [F.pad(cache, (0, 0, 0, n + T)) for cache in caches]
            for cache, new in zip(caches, (k, v)):
                cache[:, :, n:n + T] = new
            k, v = (cache[:, :, :n + T].to(q.dtype) for cache in caches)
            state = *caches, n + T
        mask = None if n == 0 or T == 1 else torch.ones(T, n + T, dtype=torch.bool, device=x.device).tril(n)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=n == 0 and T > 1)
        return self.out_proj(y.transpose(1, 2).flatten(2)), state

    step = forward


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)"""
    def __init__(self, C, hidden):
        super().__init__()
        self.in_proj = nn.Linear(C, 2 * hidden, bias=False)  # gate, value
        self.out_proj = nn.Linear(hidden, C, bias=False)

    def forward(self, x):
        gate, value = self.in_proj(x).chunk(2, -1)
        return self.out_proj(F.silu(gate) * value)


class Block(nn.Module):
    def __init__(self, config, kind):
        super().__init__()
        C = config.n_embd
        self.norm1 = nn.LayerNorm(C, bias=False)
        self.mixer = {'S': FNOMixer, 'L': GLAMixer, 'A': AttentionMixer}[kind](config)
        self.norm2 = nn.LayerNorm(C, bias=False)
        self.mlp = MLP(C, config.mlp_hidden or 2 * C)

    def forward(self, x, state=None, mix=None):
        y, state = (mix or self.mixer)(self.norm1(x), state)
        x = x + y
        return x + self.mlp(self.norm2(x)), state

    def step(self, x, state):
        return self.forward(x, state, self.mixer.step)


class FELA(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        kinds = (config.pattern * config.n_layer)[:config.n_layer]
        self.attention = 'A' in kinds
        padded = -(-config.vocab_size // 64) * 64  # GPUs like round sizes; the padding gets no probability
        self.embedding = nn.Embedding(padded, config.n_embd)  # also the output weights
        self.blocks = nn.ModuleList(Block(config, kind) for kind in kinds)
        self.norm = nn.LayerNorm(config.n_embd, bias=False)
        self.checkpoint_activations = False  # recompute blocks in backward: less memory, a third more time
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """All initialisation. Weights are N(0, 0.02), smaller where they write to the residual stream."""
        C, M, H = self.config.n_embd, self.config.n_modes, self.config.gla_heads
        for name, p in self.named_parameters():
            if name.endswith('out_proj.weight'):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif name.endswith('short_taps'):  # the identity and a little of the past
                nn.init.normal_(p, std=0.1)[0].add_(1)
            elif name.endswith('taps'):  # filters of unit energy under their windows
                nn.init.normal_(p).div_(self.get_submodule(name[:-5]).window().norm(dim=0))
            elif name.endswith(('norm.weight', 'norm1.weight', 'norm2.weight', 'direct')):
                nn.init.ones_(p)
            elif name.endswith('decay_up.bias'):  # time constants from sqrt(M) to M sqrt(M) in each head
                tau = float(M) ** torch.linspace(0.5, 1.5, C // H, device=p.device).repeat(H)
                p.copy_(torch.logit(1 / (tau.clamp(min=2) * -GLAMixer.floor)))
            else:
                assert p.dim() == 2, name
                nn.init.normal_(p, std=0.02)

    def num_parameters(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T):
        """Of training, 3 x forward: 2 for every parameter, 4 for every number of L's state, 2 C T for A"""
        C, kinds = self.config.n_embd, [type(block.mixer) for block in self.blocks]
        states = kinds.count(GLAMixer) * C * C // self.config.gla_heads
        return 3 * (2 * self.num_parameters() + 4 * states + 2 * C * T * kinds.count(AttentionMixer))

    def configure_optimizers(self, name='adamw', learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.95)):
        """-> list of optimizers over named groups, each with an lr_scale that the schedule is multiplied by.
        'adamw', or 'muon': Muon for the matrices inside blocks and AdamW for the rest."""
        if name not in ('adamw', 'muon'):
            raise ValueError(f"optimizer={name!r}: expected 'adamw' or 'muon'")
        groups, adamw, muon = {}, [], []  # by kind, and by the projections in a matrix (q, k, v)
        for n, p in self.named_parameters():
            kind = ('filters' if n.endswith('taps') else 'embedding' if n == 'embedding.weight' else
                    'matrices' if p.dim() == 2 else 'vectors')
            parts = 1 if not n.endswith('in_proj.weight') else 2 if 'mlp' in n else len(p) // p.shape[1]
            groups.setdefault((kind, parts), []).append(p)
        for (kind, parts), params in groups.items():
            wide = kind in ('matrices', 'embedding')
            group = dict(params=params, name=kind, parts=parts, weight_decay=weight_decay if wide else 0.0,
                         lr_scale=1.0 if wide or name == 'muon' else 3.0)  # 3 gains 0.03 nats in AdamW
            (muon if name == 'muon' and kind == 'matrices' else adamw).append(group)
        optimizers = [torch.optim.AdamW(adamw, lr=learning_rate, betas=betas, fused=True)]
        return optimizers + ([Muon(muon, lr=learning_rate)] if muon else [])

    def hidden(self, x, state=None, step=False):
        """embeddings x (B,T,C), of a step (B,1,C) -> (normalised output of the last block, like x; state)"""
        again, new_state = self.checkpoint_activations and torch.is_grad_enabled(), []
        for block, s in zip(self.blocks, state or [None] * len(self.blocks)):
            x, s = (block.step if step else recompute(block) if again else block)(x, s)
            new_state.append(s)
        return self.norm(x), new_state if state else None

    def logits(self, h):
        """h (...,C), normalised -> (...,vocab) fp32"""
        return F.linear(h, self.embedding.weight.to(h.dtype))[..., :self.config.vocab_size].float()

    def forward(self, idx, targets=None, reduction='mean'):
        """idx (B,T) int64 -> (logits (B,T,vocab), None); with targets (B,T), -1 ignored, (None, loss in
        nats): reduction 'mean' over the targets, or 'none' for the loss of each token (B,T)."""
        h, _ = self.hidden(self.embedding(idx))
        if targets is None:
            return self.logits(h), None
        losses = recompute(lambda h, y: F.cross_entropy(self.logits(h), y, ignore_index=-1, reduction='none'))
        parts = zip(h.flatten(0, 1).split(2048), targets.flatten().split(2048))  # as logits are large
        loss = torch.cat([losses(*part) for part in parts]).view_as(targets)
        return None, loss if reduction == 'none' else loss.sum() / (targets >= 0).sum().clamp(min=1)

    def init_state(self, batch_size):
        """The state before the first token, by layer; of fixed size, but for A. S keeps its taps in it"""
        return [block.mixer.init_state(batch_size) for block in self.blocks]

    @torch.inference_mode()
    def prefill(self, idx, state=None):
        """idx (B,T) -> (logits of the last token (B,vocab), state). In segments, so memory does not grow"""
        (B, T), state = idx.shape, state or self.init_state(len(idx))
        segment = T if self.attention else max((16384 if idx.is_cuda else 2048) // B, self.config.n_modes)
        for part in idx.split(segment, 1):
            h, state = self.hidden(self.embedding(part), state)
        return self.logits(h[:, -1]), state

    @torch.inference_mode()
    def step(self, idx, state):
        """idx (B,) -> (logits (B,vocab), state), advanced in place; to go two ways, repeat_state() first"""
        h, state = self.hidden(self.embedding(idx.unsqueeze(1)), state, step=True)
        return self.logits(h[:, 0]), state

    def compile_blocks(self):
        """torch.compile by blocks, as layers of a kind share their code: forward, and step for decoding"""
        for block in self.blocks:
            block.compile(dynamic=False)
            block.step = torch.compile(block.step, dynamic=False, options={'coordinate_descent_tuning': True})

    @torch.inference_mode()
    def capture_step(self, idx, state):
        """step(idx, state) as one CUDA graph, some 300 kernels started at once, over its own copy of state"""
        idx, state = idx.clone(), repeat_state(state, 1)
        with torch.cuda.stream(torch.cuda.Stream(idx.device)):  # warm up where nothing is captured
            self.step(idx, repeat_state(state, 1))
        torch.cuda.synchronize(idx.device)
        with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
            logits, _ = self.step(idx, state)

        def step(token, _):
            idx.copy_(token)
            graph.replay()
            return logits, state
        return step

    @torch.inference_mode()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None, state=None):
        """Yields the next token of each row (B,). idx is read after `state`; temperature 0 is greedy"""
        (logits, state), step = self.prefill(idx, state), self.step
        for i in range(max_new_tokens):
            token = sample(logits, temperature, top_k, top_p, generator)
            yield token
            if i == 0 and idx.is_cuda and not self.attention:
                step = self.capture_step(token, state)
            logits, state = step(token, state)

    def generate(self, idx, max_new_tokens, **options):
        """idx (B,T) -> (B,T+max_new_tokens), the prompt and what follows; options as of stream"""
        return torch.cat((idx, *(t.unsqueeze(1) for t in self.stream(idx, max_new_tokens, **options))), 1)


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """logits (B,vocab) -> token ids (B,)"""
    if temperature < 0:
        raise ValueError(f'temperature={temperature}: expected 0 (greedy) or more')
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    probs = logits.softmax(-1)
    if top_p < 1:
        sorted_probs, order = probs.sort(-1, descending=True)
        outside = sorted_probs.cumsum(-1) - sorted_probs >= top_p  # the first token is always inside
        probs = probs.masked_fill(outside.scatter(-1, order, outside), 0)
    return torch.multinomial(probs, 1, generator=generator).squeeze(1)


def repeat_state(state, n):
    """A copy of the state with every row n times. Rows are in tensors (B,...) of three dimensions or more."""
    def repeat(t):
        return t if isinstance(t, int) else t.repeat_interleave(n, 0) if t.dim() > 2 else t.clone()
    return [tuple(map(repeat, s)) for s in state]


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by five Newton-Schulz steps (Jordan 2024), as large as AdamW's updates (Liu et
    al. 2025). A matrix of several `parts` is q, k, v, ... one above the other: each is orthogonalised alone,
    since together those with small gradients get small steps. In bf16 on a GPU, in fp32 on a CPU."""
    def __init__(self, params, lr, weight_decay=0.1, momentum=0.95, parts=1):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, parts=parts))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum = group['lr'], group['momentum']
            for p in (p for p in group['params'] if p.grad is not None):
                mean = self.state[p].setdefault('momentum_buffer', torch.zeros_like(p))
                x = p.grad.lerp(mean.lerp_(p.grad, 1 - momentum), momentum)  # Nesterov
                x = x.view(group['parts'], -1, p.shape[1])  # (parts,rows,columns)
                tall = x.shape[1] > x.shape[2]
                x = (x.mT if tall else x).to(torch.float32 if p.is_cpu else torch.bfloat16)
                x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
                for _ in range(5):
                    gram = x @ x.mT
                    x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
                p.mul_(1 - lr * group['weight_decay'])
                p.sub_((x.mT if tall else x).reshape(p.shape), alpha=0.2 * lr * math.sqrt(max(x.shape[1:])))


# -- checkpoint files: step_000500.pt, then step_000500.json with its sha256. It exists when its .json does.

class CheckpointError(ValueError):
    """Anything wrong with a checkpoint, in one line"""


def _write(path, fill):
    try:
        return write_whole(path, fill)
    except (OSError, RuntimeError) as e:  # RuntimeError: torch.save on a full disk
        raise CheckpointError(f'{path} was not written, others are whole: {str(e).splitlines()[0]}') from None


def _check(manifest):  # sha256 of a manifest but for itself: a flipped digit of a loss is noticed
    return hashlib.sha256(json.dumps({**manifest, 'check': None}, sort_keys=True).encode()).hexdigest()


def list_checkpoints(out_dir):
    """Paths of the manifests in a folder, newest first"""
    names = os.listdir(out_dir) if os.path.isdir(out_dir) else []
    found = [m for m in (re.fullmatch(r'step_(\d{6,})(_final)?\.json', name) for name in names) if m]
    found.sort(key=lambda m: (int(m[1]), bool(m[2])), reverse=True)
    return [os.path.join(out_dir, m[0]) for m in found]


def read_manifest(path):
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        with open(path) as file:
            manifest = json.load(file)
        if manifest['check'] == _check(manifest):
            return manifest
    raise CheckpointError(f'{path} is missing, damaged, or no manifest of ours')


def save_checkpoint(out_dir, step, state, manifest, final=False, keep=0):
    """Write, then drop older ones, except the last `keep` (0: all) and the best by manifest['losses']['val'].
    state: {'model', 'optimizer', 'config', 'training'}, tensors and plain values only. -> path of the .pt"""
    path = os.path.join(out_dir, f'step_{step:06d}' + ('_final' if final else ''))
    # wrappers (DDP, torch.compile) leave their names in front of ours
    weights = {re.sub(r'^((_orig_mod|module)\.)+', '', name): p for name, p in state['model'].items()}
    digest = _write(path + '.pt', lambda file: torch.save({**state, 'model': weights}, file))
    manifest = {**manifest, 'step': step, 'final': final, 'sha256': digest}
    manifest['check'] = _check(manifest)
    _write(path + '.json', lambda file: file.write(json.dumps(manifest, indent=1).encode()))

    def val_loss(path):
        with suppress(CheckpointError, KeyError, TypeError):  # damaged, or saved without an evaluation
            return float(read_manifest(path)['losses']['val'])
        return math.inf
    older = [p for p in list_checkpoints(out_dir) if int(re.search(r'.*step_(\d+)', p)[1]) <= step]
    for old in {*older[keep:]} - {min(older, key=val_loss)} if keep else ():
        os.remove(old)  # first: a .pt without its manifest is no checkpoint
        os.remove(old[:-5] + '.pt')
    return path + '.pt'


def load_checkpoint(path, map_location='cpu'):
    """A folder gives its newest checkpoint that is whole; a file (.pt or .json) that one or CheckpointError.
    -> (state, manifest). Nothing in it is executed: sha256 first, then torch.load(weights_only=True)."""
    if os.path.isdir(path):
        for candidate in list_checkpoints(path):
            try:
                return load_checkpoint(candidate, map_location)
            except CheckpointError as e:
                print(f'warning: {e}; STEPPING BACK', file=sys.stderr, flush=True)
        raise CheckpointError(f'{path}: no whole checkpoint there (expected step_NNNNNN.pt and .json)')
    stem = os.path.splitext(path)[0]
    manifest = read_manifest(stem + '.json')
    if not re.fullmatch(f'(?!step_).*|step_{manifest["step"]:06d}(_final)?', os.path.basename(stem)):
        raise CheckpointError(f'{stem}.json is misnamed: it is the manifest of step {manifest["step"]}')
    try:
        if sha256_of(stem + '.pt') != manifest['sha256']:
            raise ValueError('its sha256 does not match its manifest: it is damaged')
        state = torch.load(stem + '.pt', map_location=map_location, weights_only=True)
        state['model'], state['config'], state['training']
        return state, manifest
    except Exception as e:  # torch.load raises whatever a foreign file leads it to
        raise CheckpointError(f'{stem}.pt is refused: {" ".join(str(e).split())[:120]}') from None


def load_model(path, device='cpu', **overrides):
    """-> (model, state, manifest); overrides are fields of the config that keep the weights (chunk_size)"""
    state, manifest = load_checkpoint(path, map_location=device)
    config = {**state['config'], **overrides}
    try:
        model = FELA(FELAConfig(**{f.name: config[f.name] for f in fields(FELAConfig) if f.name in config}))
        model.load_state_dict(state['model'])
    except (ValueError, TypeError, RuntimeError) as e:
        raise CheckpointError(f'{path} does not fit its config: {" ".join(str(e).split())[:160]}') from None
    return model.to(device), state, manifest
