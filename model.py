"""
FELA: a causal language model without softmax attention. The whole model, in plain PyTorch.

Blocks with two kinds of mixer alternate, three to one (pattern 'SSSL'); a third kind is the baseline:
    S  FNO: a causal FIR filter of M taps for every channel. FFT over a sequence, ring buffer token by token.
    L  GLA: gated linear attention, a recurrent state of H x K x V numbers. Chunks over a sequence.
    A  softmax attention with rotary positions and a KV cache, for comparisons and hybrids.
Letters in shape comments:
    B batch   T time   C channels (n_embd)   M taps (n_modes)   N = M + T inputs of a filter   n chunks
    H heads   K key width of a head   V value width of a head   c tokens in a chunk
Papers: FELA (ACML 2026); Fourier Neural Operator (Li et al. 2021); GLA (Yang et al. 2024, arXiv:2312.06635);
SwiGLU (Shazeer 2020); RoPE (Su et al. 2021); Muon (Jordan 2024).
To add a mixer, write a Mixer like FNOMixer and give it a letter in MIXERS; nothing else has to know of it.
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
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from configurator import sha256_of, write_whole


@dataclass(frozen=True)
class FELAConfig:
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12  # of A layers
    gla_heads: int = 1  # of L layers, whose state is C * C / gla_heads numbers: few, wide heads remember more
    n_embd: int = 768  # C
    n_modes: int = 512  # M, taps of S layers; gates of L start at sqrt(M) to M sqrt(M) tokens
    pattern: str = 'SSSL'  # a letter of MIXERS for each layer, repeated over the layers
    chunk_size: int = 128  # of L layers; a speed knob that never changes the function
    mlp_hidden: int = 0  # 0: 2 * n_embd

    def __post_init__(self):
        if not self.pattern or set(self.pattern) - MIXERS.keys():
            raise ValueError(f'pattern={self.pattern!r}: expected letters out of {", ".join(MIXERS)}')
        for name, value in vars(self).items():
            if type(value) is int and value < (0 if name == 'mlp_hidden' else 1):
                raise ValueError(f'{name}={value}: expected a positive number')
        for letter, name, times in (('L', 'gla_heads', 1), ('A', 'n_head', 2)):  # rotary positions turn pairs
            if letter in self.pattern and self.n_embd % (times * getattr(self, name)):
                raise ValueError(f'n_embd={self.n_embd}: expected a multiple of {name}={getattr(self, name)}'
                                 + (', an even one' if times == 2 else ''))


def recompute(f):
    """f, keeping only its arguments for backward, which computes what lies between again"""
    return functools.partial(checkpoint, f, use_reentrant=False, preserve_rng_state=False)


# -- S: causal FIR filters, by FFT or as matrix products

def causal_fir(x, taps, past=None):
    """y[b,t,c] = sum_{j<M} taps[j,c] x[b,t-j,c]: a filter of M taps for every channel.

    x (B,T,C); taps (M,C); past (B,M-1,C): the inputs just before x, None means zeros. Returns y like x.
    By FFT in fp32 (fp64 for fp64 taps), O(T log T); in bf16 on a GPU by matrix products, faster there."""
    if x.dim() != 3 or taps.dim() != 2 or taps.shape[1] != x.shape[2]:
        raise ValueError(f'expected x (B,T,C) and taps (M,C), got {tuple(x.shape)} and {tuple(taps.shape)}')
    (B, T, C), M = x.shape, len(taps)
    # one input more than is used, so that rows are as long as blocks of products want
    past = x.new_zeros(B, M, C) if past is None else F.pad(past.to(x.dtype), (0, 0, 1, 0))
    if past.shape != (B, M, C):
        raise ValueError(f'expected past (B,M-1,C) = {(B, M - 1, C)}, got {past.shape[1] - 1} inputs')
    # products are compiled for every length: those of training, and of prefill in segments
    products = x.is_cuda and x.dtype == torch.bfloat16 and M % BLOCK == T % (8 * BLOCK) == 0
    dtype = x.dtype if products else torch.promote_types(taps.dtype, torch.float32)
    inputs = torch.cat((past, x), 1).permute(2, 0, 1).to(dtype).contiguous()  # (C,B,M+T)
    return fir(inputs, taps.t().to(dtype).contiguous()).permute(1, 2, 0).to(x.dtype)


# Two operators that torch.compile, which has no complex numbers, calls as they are. x (C,B,N), taps (C,M)

@torch.library.custom_op('fela::fir', mutates_args=())
def fir(x: Tensor, taps: Tensor) -> Tensor:
    """-> y (C,B,N-M): y[t] = sum_j taps[j] x[M + t - j]"""
    return (compiled(products_fir, x.is_cuda) if x.dtype == torch.bfloat16 else fft_fir)(x, taps)


@torch.library.custom_op('fela::fir_gradients', mutates_args=())
def fir_gradients(x: Tensor, taps: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """-> those of x, sum_j taps[j] dy[i - M + j], and of taps, sum_t dy[t] x[M + t - j]"""
    f = compiled(products_gradients, x.is_cuda) if x.dtype == torch.bfloat16 else fft_gradients
    return f(x, taps, dy)


fir.register_fake(lambda x, taps: x.new_empty(*x.shape[:2], x.shape[2] - taps.shape[1]))
fir_gradients.register_fake(lambda x, taps, dy: (torch.empty_like(x), torch.empty_like(taps)))
fir.register_autograd(lambda ctx, dy: fir_gradients(*ctx.saved_tensors, dy.contiguous()),
                      setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def spectra(*signals):
    """A product of spectra is a circular filter: its users leave out what wraps around the end"""
    n = -(-signals[0].shape[-1] // 64) * 64
    return n, *(torch.fft.rfft(signal, n) for signal in signals)


def fft_fir(x, taps):
    n, X, H = spectra(x, taps.unsqueeze(1))
    return torch.fft.irfft(X * H, n)[..., taps.shape[1]:x.shape[2]].contiguous()


def fft_gradients(x, taps, dy):
    M = taps.shape[1]
    n, X, H, D = spectra(x, taps.unsqueeze(1), F.pad(dy, (M, 0)))
    dx, dtaps = torch.fft.irfft(D * H.conj(), n), torch.fft.irfft((D * X.conj()).sum(1), n)
    return dx[..., :x.shape[2]].contiguous(), dtaps[:, :M].contiguous()


# m outputs in a row depend on M+m inputs, so all n blocks of outputs are windows (C,n,M+m) @ band (C,M+m,m),
# views of inputs and taps that overlap themselves. Products written by torch.compile read them as they are;
# cuBLAS would have them copied, M/m times larger.
BLOCK = 64  # m


@functools.cache
def compiled(f, cuda):
    options = {'max_autotune': True, 'max_autotune_gemm_backends': 'TRITON'}
    return torch.compile(f, dynamic=False, options=options) if cuda else f


def windows_of(x, M, m=BLOCK):
    """x (C,B,N), its rows as one line -> (C,(B N - M)/m,M+m)"""
    C, line = len(x), x[0].numel()
    return x.as_strided((C, (line - M) // m, M + m), (line, m, 1))


def products_fir(x, taps, m=BLOCK):
    """With band[i] = taps[M-1 + m - i], in block k: y[k m + m-1-a] = sum_i x[k m + i] band[i + a]"""
    (C, B, N), M = x.shape, taps.shape[1]
    band = F.pad(taps.flip(1), (m, m - 1))  # (C,M+2m-1)
    y = torch.bmm(windows_of(x, M), band.as_strided((C, M + m, m), (M + 2 * m - 1, 1, 1)))
    y = F.pad(y.flip(2).flatten(1), (0, M))  # the M outputs between two rows belong to neither
    return y.view(C, B, N)[..., :N - M].contiguous()


def products_gradients(x, taps, dy, m=BLOCK):
    """That of x is the filter run backwards in time. For that of taps, output a of a block meets input
    i = M + a - j of its window: a tap is a diagonal of all pairs."""
    C, M = taps.shape
    line = F.pad(dy, (0, M)).flatten(1)  # (C,B N)
    dx = products_fir(F.pad(line, (M + 1, -1)).unsqueeze(1), taps.flip(1)).view(x.shape)
    pairs = torch.bmm(line[:, :-M].unflatten(1, (-1, m)).mT, windows_of(x, M))  # (C,m,M+m)
    return dx, pairs.as_strided((C, m, M), (m * (M + m), M + m + 1, 1), 1).sum(1).flip(1)


# -- L: gated linear attention

def gated_linear_attention(q, k, v, log_decay, state=None, chunk_size=128, floor=-20.0):
    """Gated linear attention (arXiv:2312.06635, eq. 3), exact for every gate and every chunk size:

        S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T,    o_t = q_t S_t        (no hidden scale)

    q, k, log_decay (B,H,T,K); v (B,H,T,V); state (B,H,K,V) fp32, None means zeros; floor <= log_decay <= 0.
    -> o (B,H,T,V) like v, the state after the last token. Matrix products are in the dtype of v; gates, sums
    and the state in fp32 (fp64 for fp64). A log_decay below floor acts as floor: e^-20 is below fp32
    rounding, and who knows a higher bound may say so, for longer chunks: those of more than one block of
    int(80 / -floor) tokens, at most 128, act as one or two blocks (8 at the default, 256 at GLAMixer's)."""
    if k.shape != q.shape or log_decay.shape != q.shape or v.shape[:3] != q.shape[:3]:
        raise ValueError('expected q, k, log_decay (B,H,T,K) and v (B,H,T,V), '
                         f'got {[tuple(t.shape) for t in (q, k, log_decay, v)]}')
    if state is None:
        dtype = torch.promote_types(v.dtype, torch.float32)
        state = v.new_zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=dtype)
    # In a block exponents stay within +-40, far from overflow. Sums of more than two are not exact enough.
    block = max(1, min(128, int(80 / -floor)))
    c = min(chunk_size, q.shape[2])
    c = c if c <= block else block * min(2, c // block)
    values = v.float() if v.dtype == torch.float16 else v  # fp16 does not hold e^40
    with torch.autocast(v.device.type, enabled=False):
        o, state = gla_chunks(q, k, values, log_decay.clamp(floor, 0), state, c, block)
    return o.to(v.dtype), state


def gla_step(q, k, v, log_decay, S, *_):
    """The recurrence itself for one token, T = 1; advances S (B,H,K,V) in place"""
    decay, (q, k, v) = log_decay.exp(), (t.to(S.dtype) for t in (q, k, v))
    o = (q * decay) @ S + (q * k).sum(-1, keepdim=True) * v  # q times what S becomes
    S.mul_(decay.mT).addcmul_(k.mT, v)
    return o, S


def gla_chunks(q, k, v, g, S, c, block):
    """Chunks of c tokens: each attends to itself, and to all before it through the state S"""
    T, dtype = q.shape[2], v.dtype
    q, k, v, g = (torch.unflatten(F.pad(t, (0, 0, 0, -T % c)), 2, (-1, c)) for t in (q, k, v, g))
    b = g.to(S.dtype).cumsum(3)  # (B,H,n,c,K) log decay from before the chunk to t
    end = b[..., -1:, :]
    inside = gla_inside(q, k, v, b, block)
    q, k = (q * b.exp()).to(dtype), (k * (end - b).exp()).to(dtype)
    outputs = []
    for q, k, v, o, decay in zip(*(t.unbind(2) for t in (q, k, v, inside, end.exp().mT))):
        outputs.append(o + q @ S.to(dtype))
        S = S * decay + k.mT @ v
    return torch.stack(outputs, 2).flatten(2, 3)[:, :, :T], S


def gla_inside(q, k, v, b, block):
    """o_t = sum_{j<=t} (q_t e^(b_t - b_j) k_j^T) v_j in chunks of c tokens, q, k, b (...,c,K), v (...,c,V)"""
    c = b.shape[-2]
    if c <= block:  # the decay is factored about the middle, where neither factor overflows
        middle = b[..., (c - 1) // 2, None, :]
        scores = (q * (b - middle).exp()) @ (k * (middle - b).exp()).mT
        return scores.tril().to(v.dtype) @ v  # fp32 until here: in the gates' gradient nearly all cancels
    # Of two halves the second also sees the first. Decays from the border between them are both <= 1.
    q, k, v, b = (t.unflatten(-2, (2, -1)) for t in (q, k, v, b))
    o1, o2 = gla_inside(q, k, v, b, block).unbind(-3)
    (_, q2), (k1, _), (v1, _), (b1, b2) = (t.unbind(-3) for t in (q, k, v, b))
    border = b1[..., -1:, :]
    q2, k1 = (q2 * (b2 - border).exp()).to(v1.dtype), (k1 * (border - b1).exp()).to(v1.dtype)
    return torch.cat((o1, o2 + (q2 @ k1.mT) @ v1), -2)


# -- mixers

def projections(width, *outputs):
    """A Linear of several projections, whose matrices stand one above the other: Muon takes each by itself"""
    linear = nn.Linear(width, sum(outputs), bias=False)
    linear.parts = len(outputs)
    return linear


class Mixer(nn.Module):
    """What is asked of a mixer: `forward` over a sequence, `step` over one token (B,1,C), state in, state out
    (None: none is wanted), `init_state(batch_size)`, and what follows. A state is two tuples: tensors with a
    row for each row of the batch, and the rest. `step` changes them in place and should not read back what it
    wrote: compiled, a Triton kernel starts before the one before it has written (A's cache is read by one
    that is not Triton's)."""
    filters = ()  # names of parameters of its own of two dimensions that are no matrices: no decay, no Muon
    # True: long sequences may come in segments, in training too: forward goes on from a state of fixed size
    # and changes nothing in it
    segmented = False

    def zeros(self, *shape, **options):
        """On the device of its parameters and, unless said otherwise, in their dtype: for states"""
        return next(self.parameters()).new_zeros(shape, **options)

    def init_weights(self):
        """Parameters that are not the weight of a Linear, which is N(0, 0.02)"""

    def flops(self, T):
        """Of a token in forward, T tokens in a sequence, beside two for each parameter"""
        return 0

    def make_room(self, state, tokens):
        """A state whose size does not change for so many more tokens"""
        return state


class FNOMixer(Mixer):
    """S: y = FIR(u) * silu(z). Taps are learned numbers times a fixed exponential window for each channel,
    whose time constants run from one token to M, plus a direct path at lag 0.
    State: ring (B,M,C), the last M inputs; pos (1,), slot of the oldest, the next to go; the tap at lag 0
    (1,C) and the others (M,C), 0 in its place."""
    filters, segmented = ('taps',), True

    def __init__(self, config):
        super().__init__()
        C = self.channels = config.n_embd
        self.in_proj, self.out_proj = projections(C, C, C), projections(C, C)  # u, z
        self.taps = nn.Parameter(torch.empty(config.n_modes, C))
        self.direct = nn.Parameter(torch.empty(C))

    def init_weights(self):  # filters of unit energy under their windows
        self.taps.normal_().div_(self.window().norm(dim=0))
        self.direct.fill_(1)

    def window(self):
        """(M,C) fp32, computed at every use: a buffer would be rounded with the weights"""
        (M, C), device = self.taps.shape, self.taps.device
        tau = float(M) ** torch.linspace(0, 1, C, device=device)
        return torch.exp(-torch.arange(M, device=device).unsqueeze(1) / tau)

    def effective_taps(self):
        taps = self.taps.float() * self.window()  # (M,C)
        return torch.cat((taps[:1] + self.direct.float(), taps[1:]))

    def init_state(self, batch_size):
        ring = self.zeros(batch_size, *self.taps.shape)
        first, others = self.effective_taps().detach().to(ring.dtype).split((1, len(self.taps) - 1))
        return (ring,), (self.zeros(1, dtype=torch.long), first.clone(), F.pad(others, (0, 0, 1, 0)))

    def forward(self, x, state=None):
        u, z = self.in_proj(x).chunk(2, -1)  # (B,T,C)
        past, M = None, len(self.taps)
        if state:
            (ring,), (pos, *taps) = state
            past = ring[:, (pos + torch.arange(M, device=x.device)) % M]  # oldest first
            ring = torch.cat((past, u), 1)[:, -M:].to(ring.dtype, copy=True)  # a view would keep all of u
            past, state = past[:, 1:], ((ring,), (torch.zeros_like(pos), *taps))
        return self.out_proj(causal_fir(u, self.effective_taps(), past) * F.silu(z)), state

    def step(self, x, state):
        u, z = self.in_proj(x).chunk(2, -1)  # (B,1,C)
        (ring,), (pos, first, others) = state
        ring.index_copy_(1, pos, u.to(ring.dtype))
        lag = (pos - torch.arange(len(others), device=x.device)) % len(others)  # how old a slot's input is
        # u itself is not read back, see Mixer: at lag 0 the tap is 0
        y = (ring * others.index_select(0, lag)).sum(1, keepdim=True) + first * u
        pos.add_(1).remainder_(len(others))
        return self.out_proj(y * F.silu(z)), state


class GLAMixer(Mixer):
    """L: q, k and v pass a short causal filter and SiLU, then gated linear attention, whose output is
    normalised per head and gated by silu(z). The forget gate is of low rank, and its log is bounded below.
    State: S (B,H,K,V) fp32; the last inputs of the short filter (B,3,3C)."""
    floor = -0.625  # of log_decay: a token keeps over half of the state, a block of 128 stays within e^+-40
    rank = 16  # of the gate projection
    width = 4  # taps of the short filter
    filters, segmented = ('short_taps',), True

    def __init__(self, config):
        super().__init__()
        C = self.channels = config.n_embd
        self.n_head, self.chunk_size, self.memory = config.gla_heads, config.chunk_size, config.n_modes
        self.in_proj, self.out_proj = projections(C, C, C, C, C), projections(C, C)  # q, k, v, z
        self.short_taps = nn.Parameter(torch.empty(self.width, 3 * C))
        self.decay_down, self.decay_up = projections(C, self.rank), nn.Linear(self.rank, C)
        # A first token's output is v (q.k): normalised, the sign of q.k, whose gradient is a spike.
        # eps, 1% of that output's variance at initialisation if silu(x) were x / 2, keeps it low.
        self.eps = 0.01 * (C // self.n_head) * (0.02 ** 2 * C / 4) ** 3

    def init_weights(self):
        self.short_taps.normal_(std=0.1)[0].add_(1)  # the identity and a little of the past
        exponents = torch.linspace(0.5, 1.5, len(self.decay_up.bias) // self.n_head).repeat(self.n_head)
        # Memories of sqrt(M) to M sqrt(M) tokens in each head, none so short that its gate is below floor.
        tau = (float(self.memory) ** exponents).clamp(min=-1.25 / self.floor)
        self.decay_up.bias.copy_(torch.logit(1 / (tau * -self.floor)))

    def flops(self, T):
        return 4 * self.channels ** 2 // self.n_head  # the state is written and read

    def init_state(self, batch_size):
        C, H = self.channels, self.n_head
        S = self.zeros(batch_size, H, C // H, C // H, dtype=torch.float32)
        return (S, self.zeros(batch_size, self.width - 1, 3 * C)), ()

    def forward(self, x, state=None, attend=gated_linear_attention):
        (B, T, C), H = x.shape, self.n_head
        (S, past), _ = state or self.init_state(B)
        qkv, z = self.in_proj(x).split((3 * C, C), -1)
        inputs = torch.cat((past.to(qkv.dtype), qkv), 1)  # (B,3+T,3C)
        taps = self.short_taps.flip(0).to(qkv.dtype)
        y = taps[0] * inputs[:, :T]
        for j in range(1, self.width):
            y = torch.addcmul(y, taps[j], inputs[:, j:j + T])
        log_decay = self.floor * torch.sigmoid(self.decay_up(self.decay_down(x)).float())
        qkvg = (t.view(B, T, H, -1).transpose(1, 2) for t in (*F.silu(y).chunk(3, -1), log_decay))
        o, S = attend(*qkvg, S, self.chunk_size, self.floor)  # (B,H,T,V)
        o = F.rms_norm(o.float(), o.shape[-1:], eps=self.eps).transpose(1, 2).flatten(2).to(z.dtype)
        state = ((S, inputs[:, T:].to(past.dtype, copy=True)), ()) if state else None
        return self.out_proj(o * F.silu(z)), state

    def step(self, x, state):
        y, ((_, past), _) = self(x, state, gla_step)
        state[0][1].copy_(past)
        return y, state


class AttentionMixer(Mixer):
    """A, the baseline: causal softmax attention with rotary positions.
    State, the KV cache: k and v (B,H,tokens,K); their number. After make_room() the number is a tensor (1,),
    and what comes is written in place, so that all steps are one program."""
    def __init__(self, config):
        super().__init__()
        C, self.n_head = config.n_embd, config.n_head
        self.channels = C
        self.in_proj, self.out_proj = projections(C, C, C, C), projections(C, C)  # q, k, v

    def flops(self, T):
        return 2 * T * self.channels  # T / 2 tokens are seen on average, as keys and as values

    def init_state(self, batch_size):
        return tuple(self.zeros(2, batch_size, self.n_head, 0, self.channels // self.n_head)), (0,)

    def make_room(self, state, tokens):
        caches, (n,) = state
        position = torch.full((1,), int(n), device=caches[0].device)
        return tuple(F.pad(cache, (0, 0, 0, tokens)) for cache in caches), (position,)

    def forward(self, x, state=None):
        (B, T, C), K = x.shape, x.shape[2] // self.n_head
        caches, (n,) = state or ((), (0,))
        static = torch.is_tensor(n)
        qkv = self.in_proj(x).view(B, T, 3, self.n_head, K).permute(2, 0, 3, 1, 4)  # (3,B,H,T,K)
        inv_freq = 10000.0 ** -(torch.arange(0, K, 2, device=x.device).float() / K)
        positions = n + torch.arange(T, device=x.device)
        angle = positions.unsqueeze(1) * inv_freq  # (T,K/2) fp32
        cos, sin, (a, b) = angle.cos(), angle.sin(), qkv[:2].chunk(2, -1)
        q, k, v = *torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(qkv.dtype), qkv[2]  # RoPE
        if static:
            for cache, new in zip(caches, (k, v)):
                cache.index_copy_(2, positions, new.to(cache.dtype))
        elif state:
            caches = tuple(torch.cat((cache, new.to(cache.dtype)), 2) for cache, new in zip(caches, (k, v)))
        k, v = (cache.to(q.dtype) for cache in caches or (k, v))
        mask = torch.arange(k.shape[2], device=x.device) <= positions.unsqueeze(1) if static or n else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        return y, (caches, (n.add_(T) if static else n + T,)) if state else None

    step = forward


MIXERS = {'S': FNOMixer, 'L': GLAMixer, 'A': AttentionMixer}  # by their letter in the pattern


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)"""
    def __init__(self, C, hidden):
        super().__init__()
        self.in_proj, self.out_proj = projections(C, hidden, hidden), projections(hidden, C)  # gate, value

    def forward(self, x):
        gate, value = self.in_proj(x).chunk(2, -1)
        return self.out_proj(F.silu(gate) * value)


class Block(nn.Module):
    def __init__(self, config, letter):
        super().__init__()
        C = config.n_embd
        self.norm1 = nn.LayerNorm(C, bias=False)
        self.mixer = MIXERS[letter](config)
        self.norm2 = nn.LayerNorm(C, bias=False)
        self.mlp = MLP(C, config.mlp_hidden or 2 * C)

    def forward(self, x, state=None, step=False):
        y, state = (self.mixer.step if step else self.mixer)(self.norm1(x), state)
        x = x + y
        return x + self.mlp(self.norm2(x)), state

    def step(self, x, state):
        return self.forward(x, state, step=True)


class FELA(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        letters = (config.pattern * config.n_layer)[:config.n_layer]
        padded = -(-config.vocab_size // 64) * 64  # GPUs like round sizes; the padding gets no probability
        self.embedding = nn.Embedding(padded, config.n_embd)  # also the output weights
        self.blocks = nn.ModuleList(Block(config, letter) for letter in letters)
        self.norm = nn.LayerNorm(config.n_embd, bias=False)
        self.segmented = all(block.mixer.segmented for block in self.blocks)
        self.checkpoint_activations = False  # recompute blocks in backward: less memory, a third more time
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Weights are N(0, 0.02), smaller where they write to the residual stream; of what is not a weight of
        a Linear or a norm, each mixer knows its own."""
        for p in self.parameters():
            p.fill_(math.nan)
        for name, module in self.named_modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.fill_(1)
            elif isinstance(module, (nn.Linear, nn.Embedding)):
                small = 2 * len(self.blocks) if 'out_proj' in name else 1
                module.weight.normal_(std=0.02 / math.sqrt(small))
        for block in self.blocks:
            block.mixer.init_weights()
        for name, p in self.named_parameters():
            assert p.is_meta or p.isfinite().all(), f'{name}: its mixer does not initialise it'

    def num_parameters(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T):
        """Of training, 3 x forward: 2 for every parameter, and what mixers do besides"""
        return 3 * (2 * self.num_parameters() + sum(block.mixer.flops(T) for block in self.blocks))

    def configure_optimizers(self, name='adamw', learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.95)):
        """-> list of optimizers over named groups, each with an lr_scale that the schedule is multiplied by.
        'adamw', or 'muon': Muon for the matrices inside blocks and AdamW for the rest."""
        if name not in ('adamw', 'muon'):
            raise ValueError(f"optimizer={name!r}: expected 'adamw' or 'muon'")
        groups, adamw, muon = {}, [], []  # by kind, and by the projections in a matrix
        for path, module in self.named_modules():
            for n, p in module.named_parameters(recurse=False):
                kind = ('embedding' if module is self.embedding else 'vectors' if p.dim() < 2 else
                        'filters' if n in getattr(module, 'filters', ()) else 'matrices')
                assert kind != 'matrices' or isinstance(module, nn.Linear), f'{path}.{n}: is it in filters?'
                groups.setdefault((kind, getattr(module, 'parts', 1)), []).append(p)
        for (kind, parts), params in groups.items():
            wide = kind in ('matrices', 'embedding')  # an embedding that does not decay overfits sooner
            group = dict(params=params, name=kind, parts=parts, weight_decay=weight_decay if wide else 0.0,
                         lr_scale=1.0 if wide or name == 'muon' else 3.0)  # in AdamW they want larger steps
            (muon if name == 'muon' and kind == 'matrices' else adamw).append(group)
        optimizers = [torch.optim.AdamW(adamw, lr=learning_rate, betas=betas, fused=True)]
        return optimizers + ([Muon(muon, lr=learning_rate)] if muon else [])

    def hidden(self, x, state=None, step=False):
        """embeddings x (B,T,C), of a step (B,1,C) -> (output of the last block, like x; state)"""
        again, new_state = self.checkpoint_activations and torch.is_grad_enabled(), []
        for block, s in zip(self.blocks, state or [None] * len(self.blocks)):
            x, s = (block.step if step else recompute(block) if again else block)(x, s)
            new_state.append(s)
        return x, new_state if state else None

    def segments(self, idx, state):
        """idx (B,T) -> (output of the last block, state) for one segment after another, if all mixers allow:
        few tokens at once bound the memory of a prefill, and fit a CPU's cache"""
        few = max((2048 if idx.is_cpu else 16384) // max(1, len(idx)), self.config.n_modes, 256)
        for segment in idx.split(few, 1) if self.segmented else (idx,):
            x, state = self.hidden(self.embedding(segment), state)
            yield x, state

    def head(self, x):
        """output of the last block (...,C) -> logits (...,vocab; on a GPU padded) in the dtype of products"""
        h, weight = self.norm(x), self.embedding.weight
        if x.is_cpu:  # padding helps only GPUs, and to cut it off later would copy all logits
            weight = weight[:self.config.vocab_size]
        return F.linear(h, weight.to(h.dtype))

    def logits(self, x):
        """-> (...,vocab) fp32"""
        return self.head(x)[..., :self.config.vocab_size].float()

    def losses(self, x, targets):
        """output of the last block (tokens,C), targets (tokens,), -1 ignored -> nats (tokens,)"""
        logits, V = self.head(x), self.config.vocab_size
        rows = 2 ** 20 // V + 1 if x.is_cpu else len(x)  # as many as a CPU's cache holds
        return torch.cat([F.cross_entropy(z[:, :V].float(), y, ignore_index=-1, reduction='none')
                          for z, y in zip(logits.split(rows), targets.split(rows))])

    def forward(self, idx, targets=None, reduction='mean'):
        """idx (B,T) int64 -> (logits (B,T,vocab) fp32, None); with targets (B,T), -1 ignored, (None, loss in
        nats): reduction 'mean' over the targets, or 'none' for the loss of each token (B,T)."""
        if reduction not in ('mean', 'none'):
            raise ValueError(f"reduction={reduction!r}: expected 'mean' or 'none'")
        if idx.is_cpu and self.segmented and idx.shape[1] > 2048:
            x = torch.cat([x for x, _ in self.segments(idx, self.init_state(len(idx)))], 1)
        else:
            x, _ = self.hidden(self.embedding(idx))
        if targets is None:
            return self.logits(x), None
        rows = 8192 if x.is_cuda else 2048  # at once, as logits are large; all are kept if a few GB hold them
        losses = self.losses if targets.numel() * self.config.vocab_size < 2 ** 30 else recompute(self.losses)
        parts = zip(x.flatten(0, 1).split(rows), targets.flatten().split(rows))
        loss = torch.cat([losses(*part) for part in parts]).view_as(targets)
        return None, loss if reduction == 'none' else loss.sum() / (targets >= 0).sum().clamp(min=1)

    def init_state(self, batch_size):
        """The state before the first token, by layer; of fixed size, but for A. S keeps its taps in it"""
        return [block.mixer.init_state(batch_size) for block in self.blocks]

    @torch.inference_mode()
    def prefill(self, idx, state=None):
        """idx (B,T) -> (logits of the last token (B,vocab), state). In segments, so memory does not grow"""
        for x, state in self.segments(idx, state or self.init_state(len(idx))):
            pass
        return self.logits(x[:, -1]), state

    @torch.inference_mode()
    def step(self, idx, state):
        """idx (B,) -> (logits (B,vocab), state), advanced in place, but for A without make_room(): go on with
        the one that is returned; to go two ways, repeat_state() first"""
        x, state = self.hidden(self.embedding(idx.unsqueeze(1)), state, step=True)
        return self.logits(x[:, 0]), state

    def compile_blocks(self):
        """torch.compile by blocks, as layers of a kind share their code: forward, and step for decoding"""
        # products of one row by reductions, norms not computed again for each of their outputs, and kernels
        # that start while the one before them ends
        options = {'coordinate_descent_tuning': True, 'realize_opcount_threshold': 8,
                   'triton.enable_pdl': True}
        tuned = functools.partial(torch.compile, dynamic=False, options=options)
        self.logits = tuned(self.logits)
        if self.norm.weight.is_cuda:
            self.losses = torch.compile(self.losses, dynamic=False)
        for block in self.blocks:
            block.compile(dynamic=False)
            block.step = tuned(block.step)

    def make_room(self, state, tokens):
        """The state, whose size does not change for so many more tokens"""
        return [block.mixer.make_room(s, tokens) for block, s in zip(self.blocks, state)]

    @torch.inference_mode()
    def capture_step(self, idx, state):
        """step(idx, state) as one CUDA graph, some 300 kernels started at once, with its own copy of state"""
        idx = idx.clone()
        torch.cuda.synchronize(idx.device)  # another stream does not wait for idx and state
        with torch.cuda.stream(stream := torch.cuda.Stream(idx.device)):  # warm up before the capture
            self.step(idx, repeat_state(state, 1))
        state = repeat_state(state, 1)
        with torch.cuda.graph(graph := torch.cuda.CUDAGraph(), stream=stream):
            logits, _ = self.step(idx, state)

        @torch.inference_mode()
        def step(token, _):
            idx.copy_(token)
            graph.replay()
            return logits, state
        return step

    @torch.inference_mode()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None, state=None):
        """Yields the next token of each row (B,). idx is read after `state`; temperature 0 is greedy"""
        state = state and self.make_room(state, idx.shape[1])  # a cache with room needs it for the prompt too
        (logits, state), step = self.prefill(idx, state), self.step
        state = self.make_room(state, max_new_tokens)
        for i in range(max_new_tokens):
            token = sample(logits, temperature, top_k, top_p, generator)
            yield token
            if i + 1 == max_new_tokens:
                return
            if i == 0 and idx.is_cuda:
                step = self.capture_step(token, state)
            logits, state = step(token, state)

    def generate(self, idx, max_new_tokens, **options):
        """idx (B,T) -> (B,T+max_new_tokens), the prompt and what follows; options as of stream"""
        return torch.cat((idx, *(t.unsqueeze(1) for t in self.stream(idx, max_new_tokens, **options))), 1)


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """logits (B,vocab) -> token ids (B,)"""
    if not (temperature >= 0 and (top_k or 0) >= 0 and top_p > 0):
        raise ValueError(f'temperature={temperature}, top_k={top_k}, top_p={top_p}: expected 0 (greedy) or '
                         'more, a number of tokens or 0, a share above 0')
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
    """A copy of the state with every row n times"""
    return [(tuple(t.repeat_interleave(n, 0) for t in rows),
             tuple(t.clone() if torch.is_tensor(t) else t for t in rest)) for rows, rest in state]


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by five Newton-Schulz steps (Jordan 2024), as large as AdamW's updates (Liu et
    al. 2025). A matrix of several `parts` is q, k, v, ... one above the other: each is orthogonalised alone,
    since together those with small gradients get small steps. In bf16 on a GPU, in fp32 on a CPU."""
    def __init__(self, params, lr, weight_decay=0.1, momentum=0.95, parts=1):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, parts=parts))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum, parts, shapes = group['lr'], group['momentum'], group['parts'], {}
            for p in group['params']:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():  # equal shapes at once, as each alone is small for a GPU
                updates = []
                for p in params:
                    mean = self.state[p].setdefault('momentum_buffer', torch.zeros_like(p))
                    mean.lerp_(p.grad, 1 - momentum)
                    updates.append(p.grad.lerp(mean, momentum).view(parts, -1, shape[1]))  # Nesterov
                x = orthogonalise(torch.cat(updates))  # (n parts,rows,columns)
                for p, update in zip(params, x.split(parts)):
                    p.mul_(1 - lr * group['weight_decay'])
                    p.sub_(update.reshape(shape), alpha=0.2 * lr * math.sqrt(max(x.shape[1:])))


def orthogonalise(x):
    """x (n,rows,columns) -> each with all its singular values near 1, by Newton-Schulz steps"""
    tall = x.shape[1] > x.shape[2]
    x = (x.mT if tall else x).to(torch.float32 if x.is_cpu else torch.bfloat16)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


# -- checkpoint files: step_000500.pt, then step_000500.json with its sha256. It exists when its .json does.

class CheckpointError(ValueError):
    """Anything wrong with a checkpoint, in one line"""


def load_optim(optimizer, saved):
    """Give an optimizer the 'state' of a saved state dict, not its knobs, or leave it as it is and raise
    CheckpointError: a fused step would write beyond a moment that is smaller than its weight."""
    weights = dict(enumerate(p for group in optimizer.param_groups for p in group['params']))
    for i, moments in saved.items():
        for name, value in moments.items():
            shape = () if name == 'step' else tuple(weights[i].shape)
            if value.shape != shape:
                raise CheckpointError(f'optimizer: {name} is {tuple(value.shape)}: expected {shape}')
    optimizer.load_state_dict({**optimizer.state_dict(), 'state': saved})


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
    names = [name for name in names if re.fullmatch(r'step_\d{6,}(_final)?\.json', name)]
    names.sort(key=lambda name: (int(re.search(r'\d+', name)[0]), name), reverse=True)
    return [os.path.join(out_dir, name) for name in names]


def read_manifest(path):
    why = 'missing, damaged, or no manifest of ours'
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        with open(path) as file:
            manifest = json.load(file)
        if 'manifest_sha256' in manifest:
            why = 'of the first edition of FELA (commit 710124b), another model'
        if manifest['check'] == _check(manifest):
            return manifest
    raise CheckpointError(f'{path} is {why}')


def save_checkpoint(out_dir, step, state, manifest, final=False, keep=0):
    """Write, then drop older ones, except the last `keep` (0: all) and the best by manifest['losses']['val'].
    state: {'model', 'optimizer', 'config', 'training'}, tensors and plain values only. -> path of the .pt"""
    path = os.path.join(out_dir, f'step_{step:06d}' + ('_final' if final else ''))
    # wrappers (DDP, torch.compile) leave their names in front of ours
    weights = {re.sub(r'^((_orig_mod|module)\.)+', '', name): p for name, p in state['model'].items()}
    digest = _write(path + '.pt', lambda file: torch.save({**state, 'model': weights}, file))
    manifest = {**manifest, 'step': step, 'final': final, 'sha256': digest}
    manifest['check'] = _check(manifest)
    try:
        _write(path + '.json', lambda file: file.write(json.dumps(manifest, indent=1).encode()))
    except CheckpointError:
        if not os.path.exists(path + '.json'):
            os.remove(path + '.pt')  # alone it is no checkpoint, and takes the room of the next one
        raise

    def val_loss(path):
        with suppress(ValueError, KeyError, TypeError):  # damaged, or saved without an evaluation
            loss = float(read_manifest(path)['losses']['val'])
            return math.inf if math.isnan(loss) else loss
        return math.inf
    older = [p for p in list_checkpoints(out_dir) if int(re.search(r'.*step_(\d+)', p)[1]) <= step]
    for old in {*older[keep:]} - {min(older, key=val_loss)} if keep else ():
        os.remove(old)  # first: a .pt without its manifest is no checkpoint
    names = os.listdir(out_dir) if keep else ()
    for name in names:  # the .pt of those, and what killed runs left
        if re.fullmatch(r'step_\d+(_final)?\.pt', name) and name[:-2] + 'json' not in names:
            os.remove(os.path.join(out_dir, name))
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
    if not os.path.exists(path):
        raise CheckpointError(f'{path} is not there: expected a folder of checkpoints, or one of them')
    stem = os.path.splitext(path)[0]
    manifest = read_manifest(stem + '.json')
    try:
        if not re.fullmatch(f'(?!step_).*|step_{manifest["step"]:06d}(_final)?', os.path.basename(stem)):
            raise ValueError(f'it is misnamed, its manifest is of step {manifest["step"]}')
        if sha256_of(stem + '.pt') != manifest['sha256']:
            raise ValueError('its sha256 does not match its manifest: it is damaged')
        state = torch.load(stem + '.pt', map_location=map_location, weights_only=True)
        state['model'], state['config'], state['training']
        return state, manifest
    except Exception as e:  # torch.load raises whatever a foreign file leads it to
        raise CheckpointError(f'{stem}.pt is refused: {" ".join(str(e).split())[:120]}') from None


def load_model(path, device='cpu', **overrides):
    """-> (model, state, manifest); overrides are fields of the config that keep the weights (chunk_size)"""
    state, manifest = load_checkpoint(path)
    try:
        config = state['config']
        with torch.device(device):
            known = {f.name: config[f.name] for f in fields(FELAConfig) if f.name in config}
            model = FELA(FELAConfig(**{**known, **overrides}))
        model.load_state_dict(state['model'])
    except (ValueError, TypeError, RuntimeError) as e:
        raise CheckpointError(f'{path} does not fit its config: {" ".join(str(e).split())[:160]}') from None
    return model, state, manifest
