"""
FELA: a causal language model without softmax attention.

Two mixers alternate (pattern 'SSSL'): S, the FNO mixer, is a causal FIR filter per channel computed by FFT (in bf16 on CUDA by
matrix products, which are faster there); L is gated linear attention (GLA). A, softmax attention with rotary positions, is the
baseline arm.

Glossary, used in every shape comment
    B batch      T time      C channels (n_embd)      M taps (n_modes)      N tokens, B*T
    H heads      K key width per head      V value width per head      c chunk      n number of chunks
Sources: FELA (ACML 2026); Fourier Neural Operator (Li et al. 2021); GLA (Yang et al. 2024, arXiv:2312.06635);
overlap-save (Oppenheim & Schafer, ch. 8); SwiGLU (Shazeer 2020); RoPE (Su et al. 2021); Muon (Jordan 2024).
"""

import atexit
import hashlib
import json
import math
import os
import re
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import unflatten  # torch.compile of 2.11 cannot trace the method
from torch.utils.checkpoint import checkpoint

try:  # comes with torch for CUDA
    import triton
    import triton.language as tl
except ImportError:
    triton = None


@dataclass(frozen=True)
class FELAConfig:
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768  # C
    n_modes: int = 512  # M, taps of an S layer
    pattern: str = 'SSSL'  # S: FNO, L: GLA, A: softmax attention; repeated over the layers
    chunk_size: int = 64  # of GLA; a speed knob, never changes the function
    mlp_hidden: int = 0  # 0: 2 * n_embd
    segment: int = 0  # tokens that go through all layers together (0: by device); a speed knob too

    def __post_init__(self):
        for name in ('vocab_size', 'n_layer', 'n_head', 'n_embd', 'n_modes', 'chunk_size'):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f'{name}={value!r}: expected an integer of at least 1')
        if self.n_embd % self.n_head or 'A' in self.pattern and self.n_embd // self.n_head % 2:
            raise ValueError(f'n_embd={self.n_embd}: expected a multiple of n_head={self.n_head}'
                             + ' with an even quotient' * ('A' in self.pattern))
        if not self.pattern or set(self.pattern) - set('SLA'):
            raise ValueError(f"pattern={self.pattern!r}: expected letters out of S (FNO), L (GLA), A (attention)")
        if not isinstance(self.mlp_hidden, int) or self.mlp_hidden < 0:
            raise ValueError(f'mlp_hidden={self.mlp_hidden!r}: expected 0 (2 * n_embd) or a positive integer')


# ---------------------------------------------------------------------------------------------------------------------
# S: causal FIR by FFT


class _FIR(torch.autograd.Function):
    """Overlap-save: past (C,B,M-1) and x (C,B,T), taps (M,C), spectrum (C,F) of the taps for blocks of n inputs -> y (C,B,T)
    in the dtype of x. A block of n inputs gives n-M+1 outputs. Only past and x are kept; backward computes their spectra again.
    Channels come first, so that every copy and cast runs along memory (transposing ones were a fifth of a step on an H200)."""

    @staticmethod
    def forward(ctx, past, x, taps, spectrum, n):
        ctx.save_for_backward(past, x, spectrum)
        ctx.n, ctx.M = n, taps.shape[0]
        y = torch.fft.irfft(_block_spectra(past, x, n, ctx.M, taps.dtype).mul_(spectrum[:, None, None]), n=n)  # (C,B,blocks,n)
        return y[..., ctx.M - 1:].flatten(2)[..., :x.shape[-1]].to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        past, x, spectrum = ctx.saved_tensors
        n, M, T = ctx.n, ctx.M, dy.shape[-1]
        step = n - M + 1
        full, rest = divmod(T, step)
        padded = spectrum.real.new_zeros(*x.shape[:2], full + (rest > 0), n)  # outputs sit at the end of their block
        padded[:, :, :full, M - 1:] = unflatten(dy[..., :T - rest], -1, (full, step))
        if rest:
            padded[:, :, full, M - 1:M - 1 + rest] = dy[..., T - rest:]
        dY = torch.fft.rfft(padded)  # (C,B,blocks,F)
        dpast = dx = dtaps = None
        if ctx.needs_input_grad[2]:
            X = _block_spectra(past, x, n, M, padded.dtype)
            dtaps = torch.fft.irfft((X.conj() * dY).sum((1, 2)), n=n)[:, :M].t()  # (C,n) -> (M,C)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            d = torch.fft.irfft(dY.mul_(spectrum.conj()[:, None, None]), n=n)  # (C,B,blocks,n)
            d[:, :, 1:, :M - 1] += d[:, :, :-1, step:]  # neighbours share M-1 inputs
            both = x.new_empty(*x.shape[:2], d.shape[2] * step + M - 1)
            unflatten(both[..., :1 - M or None], -1, (-1, step)).copy_(d[..., :step])
            both[..., both.shape[-1] - M + 1:] = d[:, :, -1, step:]
            dpast, dx = both[..., :M - 1].contiguous(), both[..., M - 1:M - 1 + T].contiguous()  # 2.11 compiles for these strides
        return dpast, dx, dtaps, None, None


def _block_spectra(past, x, n, M, dtype):
    """past (C,B,M-1), x (C,B,T) -> (C,B,blocks,F): spectra of blocks of n inputs that overlap by M-1."""
    (C, B, T), step = x.shape, n - M + 1
    padded = torch.empty(C, B, -(-T // step) * step + M - 1, dtype=dtype, device=x.device)
    padded[..., :M - 1] = past
    padded[..., M - 1:M - 1 + T] = x
    padded[..., M - 1 + T:] = 0
    return torch.fft.rfft(padded.unfold(-1, n, step))


def _fft_size(T, M):
    """Length of an FFT block: everything at once for short T, else 5M (4M outputs and M-1 inputs of overlap)."""
    return M * min(5, -(-(T + M - 1) // M))


def causal_fir(x, taps, past=None):
    """Causal FIR filter per channel, y[b,t,c] = sum_{j<M} taps[j,c] * x[b,t-j,c], by overlap-save FFT.

    x (B,T,C) any float dtype; taps (M,C) fp32 or fp64, the dtype of the FFT; past (B,M-1,C): the inputs just before
    x, None means zeros. Returns y (B,T,C) in the dtype of x. Differentiable in x, taps and past.
    """
    if x.dim() != 3 or taps.dim() != 2 or taps.shape[1] != x.shape[2] or 0 in x.shape or 0 in taps.shape:
        raise ValueError(f'causal_fir: expected x (B,T,C) and taps (M,C), got {tuple(x.shape)} and {tuple(taps.shape)}')
    M = taps.shape[0]
    if past is not None and past.shape != (x.shape[0], M - 1, x.shape[2]):
        raise ValueError(f'causal_fir: expected past (B,M-1,C) = {(x.shape[0], M - 1, x.shape[2])}, got {tuple(past.shape)}')
    past = x.new_zeros(x.shape[0], M - 1, x.shape[2]) if past is None else past.to(x.dtype)
    taps = taps if taps.dtype == torch.float64 else taps.float()
    return _fir(past.permute(2, 0, 1), x.permute(2, 0, 1), taps).permute(1, 2, 0)


@torch.compiler.disable  # inductor has no complex numbers, and made of this an illegal memory access on an H200 (torch 2.11)
def _fir(past, x, taps):
    """past (C,B,M-1), x (C,B,T), taps (M,C) -> (C,B,T)"""
    n = _fft_size(x.shape[-1], taps.shape[0])
    spectrum = torch.fft.rfft(taps.detach().t(), n=n)  # (C,F)
    return _FIR.apply(past, x, taps, spectrum, n)


def _triton_for(x):
    """What these Triton kernels are for"""
    return triton is not None and x.is_cuda and x.dtype == torch.bfloat16


class _TritonFIR(torch.autograd.Function):
    """The same filter on matrix units: past (C,B,M), its first unused so that sizes stay round, or None, x (C,B,T), taps (C,M) ->
    y (C,B,T). A block of m outputs is a window of M+m inputs times the Toeplitz matrix of the taps. More operations than FFTs, but
    both are read from x and taps as the kernel goes: in memory they would be ten times x."""

    @staticmethod
    def forward(ctx, past, x, taps):
        P, x = (0, x.contiguous()) if past is None else (past.shape[2], torch.cat((past, x), 2))
        ctx.save_for_backward(x, taps)
        ctx.P = P
        with nullcontext() if torch.compiler.is_compiling() else torch.cuda.device_of(x):  # Triton runs on the current device
            return _filter(x, taps, x.shape[2] - P, P)

    @staticmethod
    def backward(ctx, dy):
        (x, taps), P, dy = ctx.saved_tensors, ctx.P, dy.contiguous()
        (C, B, n), M, m, rows, width = x.shape, taps.shape[1], 64, 64, 128
        blocks, pairs = -(-n // m), torch.empty(C, m, M, device=x.device)
        steps = -(-B * blocks // rows)
        _taps_kernel[-(-(M + m - 1) // width), C](x, dy, pairs, B, blocks, n, dy.shape[2], P, M, steps, m, rows, width)
        skip = 0 if ctx.needs_input_grad[0] else P  # at the start of a sequence the past needs no gradient
        dx = _filter(dy, taps, n - skip, skip - P, True)
        return dx[..., :P - skip] if P > skip else None, dx[..., P - skip:], pairs.sum(1).to(taps.dtype)


def _filter(x, taps, n, shift, ahead=False):
    """y[c,b,t] = sum_j taps[c,j] x[c,b,t+shift-j] over what x has, +j if ahead: x (C,B,T) contiguous, taps (C,M) -> (C,B,n)"""
    (C, B, T), M, m = x.shape, taps.shape[1], 64
    y, blocks = x.new_empty(C, B, n), -(-n // m)
    rows = min(128, max(16, 1 << (B * blocks - 1).bit_length()))
    padded = F.pad(taps.to(x.dtype), (2 * m, 2 * m))  # no lag that the kernel looks at is outside of it
    _filter_kernel[-(-B * blocks // rows), C](x, padded, y, B, blocks, T, n, shift, M, ahead, m, rows)
    return y


def _fir_step(u, z, ring, pos, taps2):
    """u, z (B,C), ring (B,C,M), pos (), taps2 (C,2M) -> silu(z) times the filter's output (B,C); u goes into slot pos of the ring"""
    (B, C, M), y = ring.shape, torch.empty_like(z, memory_format=torch.contiguous_format)
    slots = 1 << (M - 1).bit_length()
    rows = min(1 << (B - 1).bit_length(), 16, max(1, 8192 // slots))  # so many numbers of the ring fit a program's registers
    with nullcontext() if torch.compiler.is_compiling() else torch.cuda.device_of(u):
        _fir_step_kernel[C, -(-B // rows)](u, z, ring, pos, taps2, y, B, C, u.stride(0), z.stride(0), M, slots, rows)
    return y


if triton is not None:
    @triton.jit
    def _filter_kernel(x, taps, y, B, blocks, T, n, shift, M: tl.constexpr, AHEAD: tl.constexpr, m: tl.constexpr,
                       ROWS: tl.constexpr):
        """ROWS blocks of m outputs of channel c: pieces (ROWS,m) of their windows times pieces (m,m) of the Toeplitz matrix"""
        c = tl.program_id(1).to(tl.int64)
        a, row = tl.arange(0, m), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        b, start = row // blocks, row % blocks * m
        inside = (b < B)[:, None]
        first = start + shift - (0 if AHEAD else M)  # input that the window begins with
        x += (c * B + b) * T + first
        taps += c * (M + 4 * m) + 2 * m
        acc = tl.zeros((ROWS, m), tl.float32)
        for k in range(0, M + m, m):
            i = k + a
            t = first[:, None] + i[None]
            window = tl.load(x[:, None] + i[None], mask=(t >= 0) & (t < T) & inside, other=0.0)
            lag = i[:, None] - a[None] if AHEAD else a[None] + M - i[:, None]  # (input, output)
            acc = tl.dot(window, tl.load(taps + lag), acc)
        t = start[:, None] + a[None]
        tl.store(y + ((c * B + b) * n)[:, None] + t, acc.to(y.dtype.element_ty), mask=(t < n) & inside)

    @triton.jit
    def _taps_kernel(x, dy, pairs, B, blocks, T, n, shift, M: tl.constexpr, STEPS: tl.constexpr, m: tl.constexpr,
                     ROWS: tl.constexpr, WIDTH: tl.constexpr):
        """pairs[c,a,lag] = sum over blocks of x[c,b,start+a] dy[c,b,start+a-shift+lag]: inputs (m,ROWS) times
        windows (ROWS,WIDTH)"""
        c = tl.program_id(1).to(tl.int64)
        a, i = tl.arange(0, m), tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
        x, dy = x + c * B * T, dy + c * B * n
        acc = tl.zeros((m, WIDTH), tl.float32)
        for r in range(0, STEPS * ROWS, ROWS):
            row = r + tl.arange(0, ROWS)
            b, start = row // blocks, row % blocks * m
            t = start[None] + a[:, None]
            block = tl.load(x + (b * T)[None] + t, mask=(t < T) & (b < B)[None], other=0.0)
            t = (start - shift)[:, None] + i[None]
            acc = tl.dot(block, tl.load(dy + (b * n)[:, None] + t, mask=(t >= 0) & (t < n) & (b < B)[:, None], other=0.0), acc)
        lag = i[None] - a[:, None]
        tl.store(pairs + (c * m + a[:, None]) * M + lag, acc, mask=(lag >= 0) & (lag < M))

    @triton.jit
    def _fir_step_kernel(u, z, ring, pos, taps2, y, B, C, u_stride, z_stride, M: tl.constexpr, SLOTS: tl.constexpr,
                         ROWS: tl.constexpr):
        """_fir_step of ROWS rows of channel c, whose taps are read once; the slot that is written is not read"""
        c, b, slot = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, SLOTS)
        p, there = tl.load(pos), b < B
        new, gate = tl.load(u + b * u_stride + c, mask=there), tl.load(z + b * z_stride + c, mask=there).to(tl.float32)
        ring += (b.to(tl.int64) * C + c) * M
        old = tl.load(ring[:, None] + slot[None], mask=there[:, None] & (slot < M)[None], other=0.0)
        inputs = tl.where((slot == p)[None], new[:, None], old).to(tl.float32)
        taps = tl.load(taps2 + c * 2 * M + M - 1 - p + slot, mask=slot < M, other=0.0).to(tl.float32)
        acc = tl.sum(inputs * taps[None], 1) * gate / (1 + tl.exp(-gate))
        tl.store(y + b * C + c, acc.to(y.dtype.element_ty), mask=there)
        tl.store(ring + p, new.to(ring.dtype.element_ty), mask=there)


# ---------------------------------------------------------------------------------------------------------------------
# L: gated linear attention


def gated_linear_attention(q, k, v, log_decay, state=None, chunk_size=64, floor=-20.0):
    """Gated linear attention (arXiv:2312.06635, eq. 3), exact for every gate and every chunk size:

        S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T,    o_t = q_t S_t        (no hidden scale)

    q, k, log_decay (B,H,T,K); v (B,H,T,V); state (B,H,K,V) fp32, None means zeros; floor <= log_decay <= 0.
    Returns o (B,H,T,V) in the dtype of v, and the state after the last token in fp32 (fp64 for fp64 inputs).
    Matrix products run in the dtype of v; gates, their sums and the state in fp32. chunk_size is a speed knob, rounded up
    to a power of two. A log_decay below floor acts as floor; e^-20 = 2e-9 is below fp32 rounding, and a caller who knows
    a higher bound may say so: it is faster. Backward recomputes the forward, so only the arguments are kept.
    """
    B, H, T, K = q.shape
    if k.shape != q.shape or log_decay.shape != q.shape or v.shape[:3] != q.shape[:3] or 0 in q.shape or 0 in v.shape:
        raise ValueError('gated_linear_attention: expected q, k, log_decay (B,H,T,K) and v (B,H,T,V), got '
                         f'{tuple(q.shape)}, {tuple(k.shape)}, {tuple(log_decay.shape)}, {tuple(v.shape)}')
    if state is None:
        state = torch.zeros(B, H, K, v.shape[-1], dtype=torch.promote_types(v.dtype, torch.float32), device=v.device)
    args = q, k, v, log_decay, state, chunk_size, floor
    if torch.is_grad_enabled() and any(t.requires_grad for t in args[:5]):
        return checkpoint(_gla, *args, use_reentrant=False, preserve_rng_state=False)
    return _gla(*args)


def _scan(update, decay, S, dtype):
    """S <- decay_i S + update_i over i < n: update (B,H,n,K,V), decay (B,H,n,K,1) -> (S before each i (B,H,n,K,V) in dtype, the
    last S). Long scans go in groups of 16, side by side: what each adds, then what each starts from, then each again from there."""
    n, states = update.shape[2], []
    if n > 32:
        pad = -n % 16
        update, decay = F.pad(update, (0, 0, 0, 0, 0, pad)), F.pad(decay, (0, 0, 0, 0, 0, pad), value=1.0)
        update, decay = (unflatten(t, 2, (-1, 16)).unbind(3) for t in (update, decay))
        local, D = update[0], decay[0]
        for u, d in zip(update[1:], decay[1:]):
            local, D = d * local + u, d * D
        start, S = _scan(local, D, S, S.dtype)
        for u, d in zip(update, decay):
            states.append(start.to(dtype))
            start = d * start + u
        return torch.stack(states, 3).flatten(2, 3)[:, :, :n], S
    for u, d in zip(update.unbind(2), decay.unbind(2)):  # unbind: indexing in a loop costs O(n^2) in backward
        states.append(S.to(dtype))
        S = d * S + u
    return torch.stack(states, 2), S


class _Scan(torch.autograd.Function):
    """_scan, whose backward is the same recurrence from the end: dupdate_i = G_{i+1} with G_i = decay_i G_{i+1} + dstates_i."""

    @staticmethod
    def forward(ctx, update, decay, S, dtype):
        states, S = _scan(update, decay, S, dtype)
        ctx.save_for_backward(states, decay)
        return states, S

    @staticmethod
    def backward(ctx, dstates, dS):
        states, decay = ctx.saved_tensors
        G, dS = _scan(dstates.flip(2), decay.flip(2), dS, dS.dtype)
        G = G.flip(2)
        return G, (G * states).sum(-1, keepdim=True), dS, None


class _Decayed(torch.autograd.Function):
    """x e^b in dtype. The gradient of b takes the product as rounded: the gradient of a gate is a sum over later tokens in which
    most of q dq and k dk cancel, if both are of the same numbers (with `own` below: errors of 1% in bf16 instead of 5 to 13%)."""

    @staticmethod
    def forward(ctx, x, b, dtype):
        decay = b.exp()
        y = x * decay
        if y.dtype != dtype:  # torch.compile of 2.11 makes wrong gradients where .to() returns its own argument
            y = y.to(dtype)
        ctx.save_for_backward(decay, y)
        ctx.dtype = x.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        decay, y = ctx.saved_tensors
        return (dy * decay).to(ctx.dtype), dy.to(decay.dtype) * y, None


def _gla(q, k, v, g, S, chunk_size, floor):
    """Chunks of c tokens. Blocks of m tokens are done at once, q and k carrying their decay from and to the block's middle.
    Then neighbours are merged, m = 2m: queries of the second meet keys of the first about their common border, where every
    factor is <= 1. A decay is always a product up to the reference itself, never a quotient of longer ones."""
    T, dtype, fp = q.shape[2], v.dtype, S.dtype
    c = max(2, 1 << (min(chunk_size, T) - 1).bit_length())
    m = min(c, 1 << int(math.log2(max(2.0, 80 / max(1.0, -floor)))))  # e^40 at the ends of a block: far from overflow, exact in fp32
    half = m // 2
    if T % c:
        q, k, v, g = (F.pad(t, (0, 0, 0, -T % c)) for t in (q, k, v, g))
    q, k, v, g = (unflatten(t, 2, (-1, m)) for t in (q, k, v, g))  # (B,H,N/m,m,.)
    g = g.to(fp).clamp(floor, 0)
    d1, d2 = g[..., :half, :].sum(-2, keepdim=True), g[..., half:, :].sum(-2, keepdim=True)
    b = g.cumsum(-2) - d1  # (B,H,N/m,m,K) log decay from the middle to t
    own = (q.to(fp) * k).sum(-1, keepdim=True)  # a token and itself, apart: no decay, and in its gradient nothing that has to cancel
    q, k = (_Decayed.apply(t, s, dtype if m == c else fp) for t, s in ((q, b), (k, -b)))
    o = (q.to(dtype) @ k.to(dtype).mT).tril(-1) @ v + (own * v).to(dtype)
    d1, d2 = d1.exp(), d2.exp()  # decay from the block's start to its middle, and on to its end (B,H,N/m,1,K)
    if m == c:  # the state goes from middle to middle, where q and k are
        S, gain = d1[:, :, 0].mT * S, d2 * torch.cat((d1[:, :, 1:], torch.ones_like(d1[:, :, :1])), 2)
        decay = gain
    else:  # from here on q comes from the block's start, and k goes to its end
        q, k, decay, gain = q * d1, k * d2, d1 * d2, torch.ones_like(d1[:, :, ::c // m])
    while m < c:
        (q1, q2), (k1, k2), (v1, v2), (o1, o2), (d1, d2) = (unflatten(t, 2, (-1, 2)).unbind(3) for t in (q, k, v, o, decay))
        o = torch.cat((o1, o2 + (q2.to(dtype) @ k1.to(dtype).mT) @ v1), 3)
        q, k, v, decay = torch.cat((q1, q2 * d1), 3), torch.cat((k1 * d2, k2), 3), torch.cat((v1, v2), 3), d1 * d2
        m *= 2
    update = (k.to(dtype).mT @ v) * gain.mT  # (B,H,n,K,V) what each chunk adds to the state
    states, S = _Scan.apply(update, decay.mT, S, dtype)
    o = o + q.to(dtype) @ states
    return o.flatten(2, 3)[:, :, :T], S


# ---------------------------------------------------------------------------------------------------------------------
# mixers: forward and step side by side; state in, state out. Without a state they start from nothing, and return none


def _one_row(x):
    """A compiled decoding step of one sequence"""
    return torch.compiler.is_compiling() and x.dim() == 2 and x.shape[0] == 1


def linear(x, weight, bias=None):
    """F.linear. A compiled decoding step has one row as a sum of products instead: it runs at the speed of memory, where matrix
    products with one row reach half of it on a CPU."""
    if _one_row(x):
        y = (weight.float() * x.float()).sum(-1)
        return (y if bias is None else y + bias).to(x.dtype).unsqueeze(0)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


def split_linear(x, weight, parts):
    """F.linear -> `parts` equal parts of it. A compiled step of one row has them as sums side by side: what combines them, a gate or
    writing one of them into the ring, then belongs to the same kernel."""
    if _one_row(x):
        return [linear(x, w) for w in weight.chunk(parts)]
    return linear(x, weight).chunk(parts, -1)


class _Gated(torch.autograd.Function):
    """silu(gate) * x, which keeps gate and x alone, a third less than autograd would. Nothing in place: torch.compile of 2.11
    makes wrong gradients of that."""

    @staticmethod
    def forward(ctx, gate, x):
        ctx.save_for_backward(gate, x)
        return F.silu(gate) * x

    @staticmethod
    def backward(ctx, grad):
        gate, x = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * x, gate), F.silu(gate) * grad


class FNOMixer(nn.Module):
    """S: y = FIR(u), gated by silu(z). Taps are learned numbers times a fixed exponential window per channel, whose time
    constants run from one token to M, plus a direct path at lag 0.

    State: ring (B,C,M), the last M inputs, where step writes slot pos, the oldest; pos () int64; taps (M,C) fp32,
    the effective taps; taps2 (C,2M), taps in reverse twice: any M columns of it are the taps rotated to fit the ring."""

    def __init__(self, config):
        super().__init__()
        C, M = config.n_embd, config.n_modes
        self.input = Linear(C, 2 * C, bias=False)
        self.output = Linear(C, C, bias=False)
        self.taps = nn.Parameter(torch.empty(M, C))
        self.direct = nn.Parameter(torch.empty(C))
        tau = float(M) ** torch.linspace(0, 1, C)
        self.register_buffer('window', torch.exp(-torch.arange(M).unsqueeze(1) / tau), persistent=False)  # (M,C)

    def effective_taps(self):
        """(M,C) fp32"""
        taps = self.taps.float() * self.window.float()
        return torch.cat((taps[:1] + self.direct.float(), taps[1:]))

    def init_state(self, batch_size):
        taps, p = self.effective_taps(), self.output.weight
        ring = torch.zeros(batch_size, *self.taps.t().shape, dtype=p.dtype, device=p.device)
        flipped = taps.detach().flip(0).t().to(p.dtype)
        return ring, torch.zeros((), dtype=torch.long, device=p.device), taps, torch.cat((flipped, flipped), 1)

    def forward(self, x, state=None):
        u, z = unflatten(self.input.weight @ x.flatten(0, 1).t(), 1, x.shape[:2]).chunk(2)  # (C,B,T), as _FIR likes it
        if state is None:
            M, taps, past = len(self.taps), self.effective_taps(), None
        else:
            ring, pos, taps, taps2 = state
            M = len(taps)
            past = ring.index_select(2, (pos + torch.arange(M, device=x.device)) % M).transpose(0, 1).to(u.dtype)  # oldest first
            ring = torch.cat((past, u[..., -M:]), -1)[..., -M:].transpose(0, 1).to(ring.dtype).contiguous()
            state = ring, torch.zeros_like(pos), taps, taps2
        if _triton_for(u):
            y = _TritonFIR.apply(past, u, taps.t())
        else:
            y = _fir(u.new_zeros(*u.shape[:2], M - 1) if past is None else past[..., 1:], u, taps)
        return unflatten(self.output((y * F.silu(z)).flatten(1).t()), 0, x.shape[:2]), state

    def step(self, x, state):
        u, z = split_linear(x, self.input.weight, 2)  # (B,C)
        ring, pos, taps, taps2 = state
        M = ring.shape[2]
        if _triton_for(u) and not _one_row(x):
            y = _fir_step(u, z, ring, pos, taps2)
        else:
            ring.index_copy_(2, pos.view(1), u.to(ring.dtype).unsqueeze(2))
            if x.is_cuda or torch.compiler.is_compiling():  # no synchronisation; the gather fuses with the sum when compiled
                rotated = taps2.unfold(1, M, 1).index_select(1, (M - 1 - pos).view(1)).squeeze(1)
            else:
                rotated = taps2.narrow(1, M - 1 - int(pos), M)
            inputs = ring
            if x.is_cuda and torch.compiler.is_compiling():  # slot pos is not read, it may still be being written: see compile_step
                inputs = u.to(ring.dtype).unsqueeze(2).where(torch.arange(M, device=x.device) == pos, ring)
            y = (inputs * rotated).sum(2).to(u.dtype) * F.silu(z)
        pos.add_(1).remainder_(M)
        return self.output(y), state


class GLAMixer(nn.Module):
    """L: gated linear attention with a low-rank gate whose log is bounded below, normalised per head and gated by silu(z)."""

    floor = -1.25  # of log_decay: at least 0.29 of the state is kept a token, so a chunk of 64 is one block
    rank = 16  # of the gate projection

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head, self.chunk_size = config.n_head, config.chunk_size
        self.input = Linear(C, 4 * C, bias=False)
        self.gate_down = Linear(C, self.rank, bias=False)
        self.gate_up = Linear(self.rank, C)
        self.output = Linear(C, C, bias=False)
        # Of the norm: 1% of the variance that a first token's output has at the start. That output is v times q k, normed it jumps
        # where q k = 0, and eps is how steeply: with 1e-5 and 2,048 channels the gradient of q and k was 90% off in bf16.
        self.eps = 0.01 * (C // config.n_head) * (0.02 ** 2 * C) ** 3

    def init_state(self, batch_size):
        K, p = self.output.in_features // self.n_head, self.output.weight
        return torch.zeros(batch_size, self.n_head, K, K, dtype=torch.float32, device=p.device)  # (B,H,K,V)

    def split(self, q, k, v, z, gate):
        """q, k, v, output gate z, forget gate before its sigmoid, all (...,C) -> q, k, v (...,H,K), z, log_decay (...,H,K) fp32"""
        heads = (self.n_head, -1)
        return unflatten(q, -1, heads), unflatten(k, -1, heads), unflatten(v, -1, heads), z, self.log_decay(gate)

    def log_decay(self, gate):
        return unflatten(self.floor * torch.sigmoid(gate.float()), -1, (self.n_head, -1))

    def gated(self, o, z):
        """o (...,H,V), z (...,C) -> (...,C)"""
        return (F.rms_norm(o.float(), o.shape[-1:], eps=self.eps).to(z.dtype) * unflatten(F.silu(z), -1, o.shape[-2:])).flatten(-2)

    def attend(self, qkvz, gate, state):
        """(B,T,4C), (B,T,C) -> (B,T,C), state"""
        q, k, v, z, log_decay = self.split(*qkvz.chunk(4, -1), gate)  # (B,T,H,K)
        if q.dtype == torch.float16:  # too narrow for e^40
            q, k, v = q.float(), k.float(), v.float()
        o, state = _gla(*(t.transpose(1, 2) for t in (q, k, v, log_decay)), state, self.chunk_size, self.floor)
        return self.gated(o.transpose(1, 2), z), state

    def forward(self, x, state=None):
        qkvz, gate = self.input(x), self.gate_up(self.gate_down(x))
        args = qkvz, gate, self.init_state(len(x)) if state is None else state
        with torch.autocast(x.device.type, enabled=False):
            if torch.is_grad_enabled():  # what lies between the products is computed again in backward
                y, S = checkpoint(self.attend, *args, use_reentrant=False, preserve_rng_state=False)
            else:
                y, S = self.attend(*args)
        return self.output(y), None if state is None else S

    def step(self, x, state):
        q, k, v, z, log_decay = self.split(*split_linear(x, self.input.weight, 4), self.gate_up(self.gate_down(x)))  # (B,H,K)
        state.mul_(log_decay.exp().unsqueeze(-1)).addcmul_(k.float().unsqueeze(-1), v.float().unsqueeze(-2))
        o = (q.float().unsqueeze(-1) * state).sum(-2)  # (B,H,V); compiled one pass with the line above
        return self.output(self.gated(o, z)), state


class AttentionMixer(nn.Module):
    """A, the baseline arm: causal softmax attention with rotary positions.

    State, the KV cache: k and v (B,H,capacity,K), length."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.input = Linear(C, 3 * C, bias=False)
        self.output = Linear(C, C, bias=False)
        K = C // config.n_head
        self.register_buffer('inv_freq', 10000.0 ** -(torch.arange(0, K, 2) / K), persistent=False)  # (K/2,)

    def init_state(self, batch_size):
        p = self.output.weight
        empty = torch.zeros(batch_size, self.n_head, 0, p.shape[0] // self.n_head, dtype=p.dtype, device=p.device)
        return empty, empty, 0

    def rotate(self, t, start):
        """t (B,H,T,K), rotated by position start + t (RoPE)"""
        angle = torch.outer(torch.arange(start, start + t.shape[2], device=t.device), self.inv_freq.float())  # (T,K/2)
        cos, sin = angle.cos().to(t.dtype), angle.sin().to(t.dtype)
        a, b = t.chunk(2, -1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)

    def forward(self, x, state=None):
        k_cache, v_cache, past = state or (None, None, 0)
        q, k, v = (unflatten(t, -1, (self.n_head, -1)).transpose(1, 2) for t in self.input(x).chunk(3, -1))  # (B,H,T,K)
        q, k = self.rotate(q, past), self.rotate(k, past)
        if past == 0:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            k, v = torch.cat((k_cache[:, :, :past], k), 2), torch.cat((v_cache[:, :, :past], v), 2)
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device).tril(past)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.output(y.transpose(1, 2).flatten(2)), state and (k, v, past + x.shape[1])

    def step(self, x, state):
        k_cache, v_cache, n = state
        q, k, v = (unflatten(t, -1, (self.n_head, -1)).unsqueeze(2) for t in split_linear(x, self.input.weight, 3))  # (B,H,1,K)
        q, k = self.rotate(q, n), self.rotate(k, n)
        if n == k_cache.shape[2]:  # full: double the capacity
            room = k.new_zeros(*k.shape[:2], max(64, n), k.shape[3])
            k_cache, v_cache = torch.cat((k_cache.to(k.dtype), room), 2), torch.cat((v_cache.to(k.dtype), room), 2)
        k_cache[:, :, n:n + 1], v_cache[:, :, n:n + 1] = k, v
        y = F.scaled_dot_product_attention(q, k_cache[:, :, :n + 1], v_cache[:, :, :n + 1])
        return self.output(y.flatten(1)), (k_cache, v_cache, n + 1)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)"""

    def __init__(self, config):
        super().__init__()
        hidden = config.mlp_hidden or 2 * config.n_embd
        self.input = Linear(config.n_embd, 2 * hidden, bias=False)
        self.output = Linear(hidden, config.n_embd, bias=False)

    def forward(self, x):
        return self.output(_Gated.apply(*split_linear(x, self.input.weight, 2)))


class Block(nn.Module):
    def __init__(self, config, kind):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.n_embd, bias=False)
        self.mixer = {'S': FNOMixer, 'L': GLAMixer, 'A': AttentionMixer}[kind](config)
        self.norm2 = nn.LayerNorm(config.n_embd, bias=False)
        self.mlp = MLP(config)

    def forward(self, x, state=None):
        y, state = self.mixer(self.norm1(x), state)
        x = x + y
        return x + self.mlp(self.norm2(x)), state

    def step(self, x, state):
        y, state = self.mixer.step(self.norm1(x), state)
        x = x + y
        return x + self.mlp(self.norm2(x)), state


# ---------------------------------------------------------------------------------------------------------------------
# loss


class _Tied(torch.autograd.Function):
    """weight (padded vocabulary,C), idx (B,T) -> weight[idx] (B,T,C), weight for the head. Backward adds the gradient of the
    first into that of the second: autograd would fill a second table with zeros (6% of a step of 1,024 tokens on a CPU)."""

    @staticmethod
    def forward(ctx, weight, idx):
        ctx.save_for_backward(idx)
        return F.embedding(idx, weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx, dx, dw):
        idx, = ctx.saved_tensors
        if dw.is_cuda:  # index_add_ differs from run to run there
            return dw.add_(torch.ops.aten.embedding_dense_backward(dx, idx, len(dw), -1, False)), None
        return dw.index_add_(0, idx.flatten(), dx.flatten(0, 1).to(dw.dtype)), None


class _LinearCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of softmax(x weight^T), its gradients computed in forward so that logits exist for few rows at a
    time: x (N,C), weight (padded vocabulary,C), targets (N,) with -1 ignored. Products in the dtype of x, sums in fp32."""

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, rows=2048):
        N, w = x.shape[0], weight.to(x.dtype)
        need_x, need_w = ctx.needs_input_grad[:2]
        part = 256 if x.device.type == 'cpu' else rows  # the softmax of this many rows stays in cache
        buffer = x.new_empty(min(N, rows), weight.shape[0])
        dx = torch.empty_like(x) if need_x else None
        dw = None
        total, count = x.new_zeros((), dtype=torch.float32), (targets >= 0).sum().clamp(min=1)
        for start in range(0, N, rows):
            xs, ys = x[start:start + rows], targets[start:start + rows].unsqueeze(1)
            e, inv = buffer[:len(xs)], torch.empty(len(xs), 1, dtype=torch.float32, device=x.device)
            for i in range(0, len(xs), part):
                ei, yi = e[i:i + part], ys[i:i + part]
                torch.mm(xs[i:i + part], w.t(), out=ei)
                ei[:, vocab_size:] = -math.inf
                top, picked = ei.amax(-1, keepdim=True), ei.gather(-1, yi.clamp(min=0))
                s = unflatten(ei.sub_(top).exp_(), -1, (-1, 64)).sum(-1).sum(-1, keepdim=True, dtype=torch.float32)  # no fp32 copy
                total += (s.log() - (picked.float() - top.float())).masked_fill_(yi < 0, 0).sum()
                if need_x or need_w:  # gradient of the logits: e / s - onehot = (e - s onehot) / s, the 1 / s on the side of C
                    at = torch.arange(len(ei), device=x.device), yi.squeeze(1).clamp(min=0)
                    ei[at] = ei[at] - s.squeeze(1).to(ei.dtype)  # scatter_add_ would copy all of ei
                    inv[i:i + part] = (1 / s).masked_fill_(yi < 0, 0)
            if need_x:
                dx[start:start + rows] = (e @ w) * inv
            if need_w:
                d = e.t() @ (xs * inv).to(x.dtype)
                dw = d.float() if dw is None else dw.add_(d)
        ctx.save_for_backward(dx, dw, count)
        ctx.used = False
        return total / count

    @staticmethod
    def backward(ctx, grad):
        if ctx.used:
            raise RuntimeError('the loss can be differentiated only once: its backward scales the gradients in place')
        ctx.used = True
        dx, dw, count = ctx.saved_tensors
        return *(None if d is None else d.mul_(grad / count) for d in (dx, dw)), None, None, None


def chunked_losses(h, weight, targets, vocab_size, rows=1024):
    """Loss per token (N,) fp32, for h (N,C); the logits of only `rows` tokens exist at a time, in backward too."""
    def losses(h, weight, targets):
        logits = F.linear(h, weight.to(h.dtype))[:, :vocab_size]
        return F.cross_entropy(logits.float(), targets, ignore_index=-1, reduction='none')
    return torch.cat([checkpoint(losses, a, weight, b, use_reentrant=False) if torch.is_grad_enabled() else losses(a, weight, b)
                      for a, b in zip(h.split(rows), targets.split(rows))])


# ---------------------------------------------------------------------------------------------------------------------
# the network


class Muon(torch.optim.Muon):
    """torch.optim.Muon (nesterov, adjust_lr_fn='match_rms_adamw'), on a CPU with its Newton-Schulz iteration in fp32. torch's is in
    bf16, which few CPUs have units for: without them a step of the default run took six times as long."""

    @torch.no_grad()
    def step(self, closure=None):
        if closure or any(p.device.type != 'cpu' for group in self.param_groups for p in group['params']):
            return super().step(closure)
        for group in self.param_groups:
            (a, b, c), momentum = group['ns_coefficients'], group['momentum']
            for p in (p for p in group['params'] if p.grad is not None):
                if not self.state[p]:
                    self.state[p]['momentum_buffer'] = torch.zeros_like(p.grad)
                mean = self.state[p]['momentum_buffer'].lerp_(p.grad, 1 - momentum)
                x = p.grad.lerp(mean, momentum).float()
                x = x.t() if len(p) > p.shape[1] else x
                x = x / x.norm().clamp(min=group['eps'])
                for _ in range(group['ns_steps']):
                    gram = x @ x.t()
                    x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
                p.mul_(1 - group['lr'] * group['weight_decay'])
                p.sub_(x.t() if len(p) > p.shape[1] else x, alpha=0.2 * group['lr'] * math.sqrt(max(p.shape)))


def _persistent_reductions():
    """Kernels that are tuned by coordinate descent may load all terms of a sum at once up to 8,192 of them; torch stops at 1,024."""
    from torch._inductor import choices, config, virtualized

    class Choices(choices.InductorChoices):
        @staticmethod
        def should_use_persistent_reduction(features, cooperative_reduction):
            few = virtualized.V.graph.sizevars.statically_known_leq(features.reduction_numel, 8192)
            default = choices.InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)
            return config.coordinate_descent_tuning and few or default
    virtualized.V.set_choices_handler(Choices())


class FELA(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        kinds = (config.pattern * config.n_layer)[:config.n_layer]
        self.attention = 'A' in kinds
        padded = -(-config.vocab_size // 64) * 64  # matrix units like round sizes; the padding gets no probability
        self.embedding = nn.Embedding(padded, config.n_embd)  # also the output weights
        self.blocks = nn.ModuleList(Block(config, kind) for kind in kinds)
        self.norm = nn.LayerNorm(config.n_embd, bias=False)
        self.checkpoint_activations = False  # recompute each block in backward: less memory, a third more time
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """All initialisation. Weights N(0, 0.02), those that write to the residual stream less (GPT-2)."""
        C, M = self.config.n_embd, self.config.n_modes
        for name, p in self.named_parameters():
            if name.endswith('output.weight'):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif name.endswith('taps'):  # filters of unit energy under their windows
                nn.init.normal_(p)
            elif name.endswith(('norm.weight', 'norm1.weight', 'norm2.weight', 'direct')):
                nn.init.ones_(p)
            elif name.endswith('gate_up.bias'):  # time constants 1/-log_decay from 1 to M tokens, spread inside each head
                heads = self.config.n_head
                tau = float(M) ** torch.linspace(0, 1, C // heads).repeat(heads)
                p.copy_(torch.logit(1 / (tau * -GLAMixer.floor)))
            else:
                assert p.dim() == 2, name
                nn.init.normal_(p, std=0.02)
        for block in self.blocks:
            if isinstance(block.mixer, FNOMixer):
                block.mixer.taps.mul_(block.mixer.window.square().sum(0).rsqrt())

    def num_parameters(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T):
        """Training FLOPs per token, forward and backward (3 x forward), at sequence length T: 2 per multiply-add of a
        matrix product; FFTs at 2.5 n log2 n; GLA and attention by their products."""
        c = self.config
        flops = 2 * sum(p.numel() for n, p in self.named_parameters() if p.dim() == 2 and not n.endswith('taps'))
        for block in self.blocks:
            if isinstance(block.mixer, FNOMixer):
                n = _fft_size(T, c.n_modes)
                flops += c.n_embd * 5 * n * math.log2(n) / (n - c.n_modes + 1)
            elif isinstance(block.mixer, GLAMixer):
                flops += 4 * c.n_embd * (c.n_embd // c.n_head) + 2 * c.n_embd * min(c.chunk_size, T)
            else:
                flops += 2 * c.n_embd * T  # causal: half of 4 C T
        return 3 * flops

    def configure_optimizers(self, name='adamw', learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.95)):
        """-> list of torch optimizers over named groups. Every group has lr_scale: train.py sets lr = schedule * lr_scale.
        'adamw', or 'muon': Muon for the matrices inside blocks and AdamW for the rest."""
        if name not in ('adamw', 'muon'):
            raise ValueError(f"optimizer={name!r}: expected 'adamw' or 'muon'")
        groups = {'matrices': [], 'embedding': [], 'filters': [], 'vectors': []}
        for n, p in self.named_parameters():
            kind = ('filters' if n.endswith('taps') else 'embedding' if n == 'embedding.weight' else
                    'matrices' if p.dim() == 2 else 'vectors')
            groups[kind].append(p)
        assert sum(map(len, groups.values())) == len(list(self.parameters()))
        decayed = ('matrices', 'embedding')
        scale = 3.0 if name == 'adamw' else 1.0  # of filters and vectors: 1.597 for 1.623 nats (tinyshakespeare, 2,000 steps)
        adam = [dict(params=ps, name=kind, **(dict(lr_scale=1.0, weight_decay=weight_decay) if kind in decayed else
                                              dict(lr_scale=scale, weight_decay=0.0)))
                for kind, ps in groups.items() if ps and not (name == 'muon' and kind == 'matrices')]
        optimizers = [torch.optim.AdamW(adam, lr=learning_rate, betas=betas, fused=True)]
        if name == 'muon':
            group = dict(params=groups['matrices'], name='matrices', lr_scale=1.0)
            optimizers.append(Muon([group], lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn='match_rms_adamw'))
        return optimizers

    def segment(self, device):
        """Tokens that go through all layers together: on a CPU few, for its cache; elsewhere for the memory of a long prefill. A
        GPU in training takes so many of every row, unless the config says how many."""
        return self.config.segment or (2048 if device.type == 'cpu' else 16384)

    def init_state(self, batch_size):
        """State before the first token: a list with one entry a layer. Its size does not depend on what was read (but for
        the KV cache of 'A' layers). It belongs to the weights it was made with."""
        return [block.mixer.init_state(batch_size) for block in self.blocks]

    def compile_blocks(self):
        """torch.compile for training and prefill, by blocks: layers of a kind share their code, so it takes seconds"""
        for block in self.blocks:
            block.compile(dynamic=False)

    def compile_step(self, batch_size=1):
        """torch.compile for decoding so many rows"""
        options = {'realize_opcount_threshold': 8}  # norms and gates are not computed again for every output of a product
        if self.norm.weight.is_cuda:
            options['coordinate_descent_tuning'] = True  # products with one row as fast as memory
            _persistent_reductions()
            # A kernel starts while the one before it ends, and asks for its weights meanwhile. With more rows it would be in
            # cuBLAS's way. torch does not wait for what the kernel before changes in place: of S and L nothing reads that.
            options['triton.enable_pdl'] = batch_size == 1 and not self.attention
        for block in self.blocks:
            block.step = torch.compile(block.step, dynamic=False, options=options)
        self.norm_logits = torch.compile(self.norm_logits, dynamic=False, options=options)

    def hidden(self, x, state=None):
        """embeddings x (B,T,C) -> (normalised output of the last block (B,T,C), state), in segments that pass their state on. With
        state None they are the start of a sequence, whose state nobody wants: training."""
        B, T, _ = x.shape
        length = T if self.attention else max(self.segment(x.device) // (1 if state is None else B), self.config.n_modes)
        if state is None:  # `forward` has seen to the number of rows
            state = [None] * len(self.blocks) if T <= length else self.init_state(B)
        outputs = []
        for x in x.split(length, 1):
            new_state = []
            for block, s in zip(self.blocks, state):
                if self.checkpoint_activations and torch.is_grad_enabled():
                    x, s = checkpoint(block, x, s, use_reentrant=False, preserve_rng_state=False)
                else:
                    x, s = block(x, s)
                new_state.append(s)
            state = new_state
            outputs.append(self.norm(x))
        return torch.cat(outputs, 1), state

    def forward(self, idx, targets=None, reduction='mean'):
        """idx (B,T) int64 -> (logits (B,T,vocab), None), or with targets (B,T), -1 ignored, (None, loss in nats):
        reduction 'mean' over the targets, or 'none' for the loss per token (B,T)."""
        B, T = idx.shape
        whole = self.attention or idx.is_cuda and torch.is_grad_enabled() and not self.config.segment  # memory is spent anyway
        rows = B if whole else max(1, self.segment(idx.device) // T)
        x, weight = _Tied.apply(self.embedding.weight, idx)
        h = torch.cat([self.hidden(part)[0] for part in x.split(rows)])
        if torch.is_autocast_enabled(idx.device.type):
            h = h.to(torch.get_autocast_dtype(idx.device.type))
        V = self.config.vocab_size
        if targets is None:
            return F.linear(h, weight.to(h.dtype))[..., :V], None
        with torch.autocast(idx.device.type, enabled=False):
            if reduction == 'mean':
                return None, _LinearCrossEntropy.apply(h.flatten(0, 1), weight, targets.flatten(), V)
            return None, chunked_losses(h.flatten(0, 1), weight, targets.flatten(), V).view(B, T)

    @torch.inference_mode()
    def prefill(self, idx, state=None):
        """idx (B,T), any T >= 1 -> (logits after the last token (B,vocab) fp32, state). Memory does not grow with T."""
        state = self.init_state(idx.shape[0]) if state is None else state
        length = idx.shape[1] if self.attention else max(self.segment(idx.device) // idx.shape[0], self.config.n_modes)
        for part in idx.split(length, 1):
            h, state = self.hidden(self.embedding(part), state)
        return self.logits(h[:, -1]), state

    @torch.inference_mode()
    def step(self, idx, state):
        """idx (B,), one token a row -> (logits (B,vocab) fp32, state). Advances `state` in place: to go two ways from one
        state, give each its own repeat_state(state, 1)."""
        x, new_state = self.embedding(idx), []
        for block, s in zip(self.blocks, state):
            x, s = block.step(x, s)
            new_state.append(s)
        return self.norm_logits(x), new_state

    def logits(self, h):
        """h (B,C), normalised -> (B,vocab) fp32"""
        return linear(h.to(self.embedding.weight.dtype), self.embedding.weight)[:, :self.config.vocab_size].float()

    def norm_logits(self, x):
        return self.logits(self.norm(x))

    @torch.inference_mode()
    def capture_step(self, idx, state):
        """-> step(idx) -> logits, the same as `step` as one CUDA graph (some 300 kernels, started at once). It owns a copy of
        the state and advances it in place. A layers stay at their position, so for them it is good for timing only."""
        idx, state = idx.clone(), repeat_state(state, 1)
        stream = torch.cuda.Stream(idx.device)
        stream.wait_stream(torch.cuda.current_stream(idx.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, and lets libraries set themselves up
                self.step(idx, repeat_state(state, 1))
        torch.cuda.current_stream(idx.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits, _ = self.step(idx, state)

        def step(token, state=state):  # the graph reads and writes this state: it has to live as long
            idx.copy_(token)
            graph.replay()
            return logits
        return step

    @torch.inference_mode()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None, state=None):
        """Yields the next token of each row (B,) as it comes. idx (B,T) is read after `state`; temperature 0 is greedy;
        top_k 0 and top_p 1 are off."""
        logits, state = self.prefill(idx, state)
        step = None
        for i in range(max_new_tokens):
            token = sample(logits, temperature, top_k, top_p, generator)
            yield token
            if i + 1 == max_new_tokens:
                return
            if step is None and idx.is_cuda and not self.attention:
                step = self.capture_step(token, state)
            if step:
                logits = step(token)
            else:
                logits, state = self.step(token, state)


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """logits (B,vocab) -> token ids (B,)"""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    probs = logits.softmax(-1)
    if top_p < 1:
        sorted_probs, order = probs.sort(-1, descending=True)
        outside = sorted_probs.cumsum(-1) - sorted_probs >= top_p  # the first token is always inside
        probs = probs.masked_fill(outside.scatter(-1, order, outside), 0)
    return torch.multinomial(probs, 1, generator=generator).squeeze(1)


def repeat_state(state, n):
    """A copy of the state with every row n times."""
    def repeat(t):
        if isinstance(t, int):
            return t
        return t.repeat_interleave(n, 0) if t.dim() > 2 else t.clone()  # rows are in tensors (B,...); taps (M,C), pos () have none
    return [tuple(map(repeat, s)) if isinstance(s, tuple) else repeat(s) for s in state]


# ---------------------------------------------------------------------------------------------------------------------
# checkpoint files
#
# step_000500.pt and step_000500.json, its manifest. The manifest is written last: a checkpoint exists when its manifest
# does. The .pt is found by the manifest's own name, so nothing written inside a file can point outside its folder.


class CheckpointError(ValueError):
    """Anything wrong with a checkpoint, in one line."""


class _HashingFile:
    """What torch.save writes to: keeps the sha256 of what was asked for, to compare with what the disk gives back."""

    def __init__(self, file):
        self.file, self.flush, self.sha256, self.bytes, self.error = file, file.flush, hashlib.sha256(), 0, None

    def write(self, data):
        try:
            self.file.write(data)
        except OSError as e:  # torch's zip writer turns "disk full" into an unreadable assertion: keep the real reason
            self.error = e
            raise
        self.sha256.update(data)
        self.bytes += memoryview(data).nbytes


def _sha256(file):
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _write_whole(path, fill):
    """At every instant, power cuts included, `path` is absent, as it was, or complete."""
    tmp, out = path + '.tmp', None
    try:
        _remove(tmp)
        with open(tmp, 'xb') as file:  # x: never through a link that somebody left there
            out = _HashingFile(file)
            fill(out)
            file.flush()
            os.fsync(file.fileno())
        with open(tmp, 'rb') as file:
            if _sha256(file) != out.sha256.hexdigest():
                raise OSError('the disk gave back something else than was written')
        os.replace(tmp, path)
        if os.name == 'posix':  # the new name itself must survive a power cut
            folder = os.open(os.path.dirname(path) or '.', os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError) as e:
        _remove(tmp)
        reason = (out and out.error) or e
        reason = getattr(reason, 'strerror', None) or str(reason).split('\n')[0]
        raise CheckpointError(f'could not write {path}: {reason}; earlier checkpoints are as they were') from None
    return out


def list_checkpoints(out_dir):
    """Paths of the manifests in a folder, newest first."""
    names = os.listdir(out_dir) if os.path.isdir(out_dir) else []  # deleted under a run that has to stop
    found = filter(None, (re.fullmatch(r'step_(\d{6,})(_final)?\.json', name) for name in names))
    return [os.path.join(out_dir, m[0]) for m in sorted(found, key=lambda m: (int(m[1]), bool(m[2])), reverse=True)]


def _manifest_sha256(manifest):
    rest = {key: value for key, value in manifest.items() if key != 'manifest_sha256'}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_manifest(path):
    """The manifest at `path`, checked against its own sha256 (one flipped digit of a step or a loss is noticed)."""
    try:
        with open(path, 'rb') as file:
            manifest = json.loads(file.read(1 << 24))
    except OSError as e:
        raise CheckpointError(f'{path}: {e.strerror}') from None
    except (ValueError, RecursionError):
        raise CheckpointError(f'{path} is damaged: not JSON') from None
    if not isinstance(manifest, dict) or manifest.get('manifest_sha256') != _manifest_sha256(manifest):
        raise CheckpointError(f'{path} is damaged or not a checkpoint manifest: its sha256 does not match')
    return manifest


def save_checkpoint(out_dir, step, state, manifest, final=False, keep=0):
    """Write, verify, then drop older ones, except the last `keep` (0: all) and the best by manifest['losses']['val'].

    state: {'model', 'optimizer', 'config', 'training'}, tensors and plain values only. Returns the path of the .pt."""
    path = os.path.join(out_dir, f'step_{step:06d}' + ('_final' if final else ''))
    # wrappers (DDP, torch.compile) leave their names in front of ours
    state = {**state, 'model': {re.sub(r'^((_orig_mod|module)\.)+', '', k): v for k, v in state['model'].items()}}
    written = _write_whole(path + '.pt', lambda out: torch.save(state, out))
    manifest = {**manifest, 'step': step, 'final': final, 'bytes': written.bytes, 'sha256': written.sha256.hexdigest()}
    manifest['manifest_sha256'] = _manifest_sha256(manifest)
    try:
        _write_whole(path + '.json', lambda out: out.write(json.dumps(manifest, indent=1, allow_nan=False).encode()))
    except CheckpointError:
        _remove(path + '.pt')  # alone it is no checkpoint, and takes the space that the next one needs
        raise
    if keep:
        _prune(out_dir, step, keep)
    return path + '.pt'


def _prune(out_dir, step, keep):
    # a later step is one that the run stepped back over: left for a person to look at
    past = [p for p in list_checkpoints(out_dir) if int(re.search(r'step_(\d+)[^/]*$', p)[1]) <= step]
    losses = {}
    for path in past:
        try:
            losses[path] = float(read_manifest(path)['losses']['val'])
        except (CheckpointError, KeyError, TypeError, ValueError):  # damaged, foreign, or saved without an evaluation
            pass
    best = min(losses, key=losses.get, default=None)
    for path in past[keep:]:
        if path != best:
            _remove(path, path[:-5] + '.pt')  # the manifest first: a .pt without one is no checkpoint


def _remove(*paths):
    for path in paths:
        try:
            os.remove(path)
        except OSError:
            pass


def open_folder(out_dir):
    """Lock a run's folder for the life of this process. Returns what a run that was killed left in the lock, or ''."""
    os.makedirs(out_dir, exist_ok=True)
    no_link = lambda path, flags: os.open(path, flags | getattr(os, 'O_NOFOLLOW', 0), 0o666)  # the file is emptied
    file = open(os.path.join(out_dir, 'lock'), 'a+', errors='replace', opener=no_link)
    try:  # the kernel holds the lock until the process ends, however it ends: the file alone locks nothing
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(0.1)  # its holder may just be writing
        file.seek(0)
        raise CheckpointError(f'{out_dir} is in use by another run: {file.read(200).strip()}') from None
    except (ImportError, OSError) as e:  # Windows, or a file system without locks (some of Lustre's and of FUSE)
        print(f'warning: {out_dir} cannot be locked, a second run in it would not be noticed: {e}', file=sys.stderr)
    file.seek(0)
    holder = file.read(200).strip()
    file.truncate(0)
    file.write(f'pid {os.getpid()}, started {time.strftime("%Y-%m-%d %H:%M:%S")}\n')
    file.flush()
    atexit.register(file.truncate, 0)
    return holder


def tidy_folder(out_dir, go_on):
    """Remove what killed runs left half done, and for a fresh start the checkpoints too."""
    there = list_checkpoints(out_dir)
    whole = {path[:-5] + '.pt' for path in there}
    names = [os.path.join(out_dir, name) for name in os.listdir(out_dir)]
    _remove(*(p for p in names if re.search(r'(step_\d+(_final)?\.(pt|json)|metrics\.jsonl)\.tmp$', p)))
    if go_on:
        _remove(*(p for p in names if re.search(r'step_\d+(_final)?\.pt$', p) and p not in whole))
    else:
        _remove(*there, *whole)


def load_checkpoint(path, map_location='cpu'):
    """A folder gives its newest checkpoint that is whole; a file (.pt or its .json) gives that one or CheckpointError.

    Returns (state, manifest). Nothing in the file is executed: hash first, then torch.load(weights_only=True)."""
    if os.path.isdir(path):
        manifests = list_checkpoints(path)
        for i, candidate in enumerate(manifests):
            try:
                return load_checkpoint(candidate, map_location)
            except CheckpointError as e:
                last = f'{e}' if i + 1 == len(manifests) else f'{e}; STEPPING BACK to {manifests[i + 1]}'
                print(f'warning: {last}', file=sys.stderr, flush=True)
        which = f'none of its {len(manifests)} checkpoints is whole' if manifests else 'no checkpoint there'
        raise CheckpointError(f'{path}: {which} (expected step_NNNNNN.pt with its manifest step_NNNNNN.json)')
    stem, ext = os.path.splitext(path)
    if not os.path.exists(path):
        raise CheckpointError(f'{path}: no such checkpoint')
    if ext not in ('.pt', '.json') or not os.path.exists(stem + '.json'):
        raise CheckpointError(f'{path}: not a checkpoint of ours: its manifest {stem}.json is missing, so it was never '
                              f'finished or comes from elsewhere')
    manifest = read_manifest(stem + '.json')
    step, final, name = manifest.get('step'), manifest.get('final'), os.path.basename(stem)
    if type(step) is not int or type(final) is not bool:
        raise CheckpointError(f'{stem}.json is not a checkpoint manifest: no step and final in it')
    if name.startswith('step_') and name != f'step_{step:06d}{"_final" * final}':
        raise CheckpointError(f'{stem}.json is misnamed: it is the manifest of step {step}')
    try:
        with open(stem + '.pt', 'rb') as file:
            size = os.fstat(file.fileno()).st_size
            if size != manifest.get('bytes'):
                raise CheckpointError(f'{stem}.pt is damaged: {size:,} bytes instead of {manifest.get("bytes")}')
            if _sha256(file) != manifest.get('sha256'):
                raise CheckpointError(f'{stem}.pt is damaged: its sha256 does not match its manifest')
            file.seek(0)
            state = torch.load(file, map_location=map_location, weights_only=True)
    except CheckpointError:
        raise
    except OSError as e:
        raise CheckpointError(f'{stem}.pt: {e.strerror or e}') from None
    except Exception as e:  # torch.load raises whatever a foreign file leads it to
        reason = ' '.join(str(e).split())[:120]
        raise CheckpointError(f'{stem}.pt is refused, not tensors and plain values only: {reason}') from None
    if not isinstance(state, dict) or not all(isinstance(state.get(k), dict) for k in ('model', 'config', 'training')):
        raise CheckpointError(f'{stem}.pt is not a FELA checkpoint: no model, config and training in it')
    return state, manifest


def load_model(path, device='cpu', **overrides):
    """(model, state, manifest) of a checkpoint; overrides are FELAConfig fields that keep the weights (chunk_size)."""
    state, manifest = load_checkpoint(path, map_location=device)
    config = {**state['config'], **overrides}
    try:
        model = FELA(FELAConfig(**{f.name: config[f.name] for f in fields(FELAConfig) if f.name in config}))
        model.load_state_dict(state['model'])
    except (ValueError, TypeError, RuntimeError, AttributeError) as e:
        raise CheckpointError(f'{path}: its weights do not fit its config: {" ".join(str(e).split())[:160]}') from None
    return model.to(device), state, manifest
