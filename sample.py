"""
Text out of a trained model: the prompt is read once, then every token costs the same, and is shown as it is made.

    python sample.py                                      the newest checkpoint of the default run, from nothing
    python sample.py --out_dir=out_gpt --prompt="def main(" --num_samples=3
    cat long.txt | python sample.py --prompt=- --max_new_tokens=1000 --stop=$'\\n\\n'

Text goes to stdout, speeds to stderr.
"""

import codecs
import json
import os
import signal
import sys
from time import perf_counter

import torch

from configurator import configure, die, pick_device, require
from model import CheckpointError, load_model, repeat_state
from prepare import DataError, get_tokenizer

# -----------------------------------------------------------------------------------------------------------
out_dir = 'out'  # a folder of checkpoints (the newest is taken), or one checkpoint
prompt = '<|endoftext|>'  # text to go on from; -: stdin. <|endoftext|> in it is the token between documents
prompt_file = ''  # read the prompt from this file
echo = 'auto'  # show the prompt before the text: auto (up to 1,000 bytes of it), on, off
num_samples = 1  # texts from the same prompt, which is read once
max_new_tokens = 500  # length of each
temperature = 0.8  # 0: always the most probable token
top_k = 0  # only from the k most probable tokens; 0: off
top_p = 0.95  # only from the most probable tokens that together have this probability; 1: off
stop = ''  # end where this text appears, and leave it out; several as JSON: '["\nclass ", "\ndef "]'
stop_at_end = True  # end at <|endoftext|>
seed = 1337  # the same seed, the same text
device = 'auto'  # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'  # of the weights: auto (float32, on CUDA bfloat16), float32, bfloat16, float16
compile = False  # torch.compile the decoding step: a minute, then faster
config = configure(globals())
globals().update(config)
# -----------------------------------------------------------------------------------------------------------

require(config, num_samples=(1, 1e6), max_new_tokens=(1, 1e15), temperature=(0, 1e6), top_k=(0, 1e15),
        top_p=(1e-9, 1), seed=(0, 1e18), echo='auto on off', dtype='auto float32 bfloat16 float16')
for name in ('SIGINT', 'SIGPIPE'):  # Ctrl-C, or a reader that has seen enough (head): end quietly
    if hasattr(signal, name):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
try:
    stops = json.loads(stop)
except ValueError:
    stops = None
if not isinstance(stops, list) or not all(isinstance(text, str) and text for text in stops):
    stops = [stop] if stop else []


def one_line(kind, error, trace):
    if isinstance(error, (CheckpointError, DataError, OSError)):
        die(error if os.path.exists(out_dir) else f'{error}; train a model with `python train.py`')
    if isinstance(error, (RuntimeError, MemoryError)):  # weights that are not finite, a device without memory
        die(f'{out_dir} on {device}: {error!s:.200}', code=1)
    sys.__excepthook__(kind, error, trace)


sys.excepthook = one_line
if prompt == '-':
    text = sys.stdin.buffer.read()
elif prompt_file:
    with open(prompt_file, 'rb') as file:
        text = file.read()
else:
    text = os.fsencode(prompt)
if not text:
    die('the prompt is empty: give some text, or leave it out to start a document')
device, fast, _ = pick_device(device, dtype)
model, state, manifest = load_model(out_dir, device)
model.eval().to(getattr(torch, fast if dtype != 'auto' or 'cuda' in device else 'float32'))
if compile:
    model.compile_blocks()
tokenizer = get_tokenizer(manifest['tokenizer'])
if tokenizer.vocab_size != model.config.vocab_size:
    die(f'{out_dir}: a vocabulary of {model.config.vocab_size} does not fit its tokenizer {tokenizer.name}')
ids = [i for part in text.split(b'<|endoftext|>') for i in (tokenizer.eot, *tokenizer.encode_bytes(part))][1:]


class Printer:
    """One text as it grows: bytes wait until they are a character, text until it cannot be part of a stop."""

    def __init__(self, write):
        self.write, self.held, self.done = write, '', False
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace')

    def add(self, data, last=False):
        self.held += self.decoder.decode(data, last)
        found = [i for i in map(self.held.find, stops) if i >= 0]
        begun = [n for s in stops for n in range(1, len(s)) if self.held.endswith(s[:n]) and not last]
        cut = min(found, default=len(self.held) - max(begun, default=0))
        self.write(self.held[:cut])
        self.held, self.done = self.held[cut:], last or bool(found)


def write(text):
    try:
        sys.stdout.buffer.write(text.encode())
        sys.stdout.buffer.flush()
    except OSError as e:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is still in the buffer
        die(f'stdout: {e.strerror}', code=1)


with torch.inference_mode():
    start, made = perf_counter(), 0
    state = model.init_state(1)
    if len(ids) > 1:
        _, state = model.prefill(torch.tensor([ids[:-1]], device=device), state)
    texts = [[] for _ in range(num_samples)]  # one is shown while it is made, several are shown after each other
    printers = [Printer(write if num_samples == 1 else parts.append) for parts in texts]
    for printer in printers:
        if echo == 'on' or echo == 'auto' and len(text) <= 1000:
            printer.write(printer.decoder.decode(text.removeprefix(b'<|endoftext|>')))
    for row in model.stream(torch.tensor([ids[-1:]] * num_samples, device=device), max_new_tokens, temperature,
                            top_k, top_p, torch.Generator(device).manual_seed(seed),
                            repeat_state(state, num_samples)):
        for printer, token in zip(printers, row.tolist()):
            end = token == tokenizer.eot and stop_at_end
            if not printer.done:
                printer.add(b'' if end else tokenizer.decode_bytes([token]), end)
        prefilled = perf_counter() if made == 0 else prefilled
        made += 1
        if all(printer.done for printer in printers):
            break
    seconds = perf_counter() - prefilled
for i, (printer, parts) in enumerate(zip(printers, texts)):
    if not printer.done:
        printer.add(b'', last=True)
    write((f'{"-" * 40} {i + 1} of {num_samples}\n' if num_samples > 1 else '') + ''.join(parts) + '\n')
decode = f'{(made - 1) * num_samples / seconds:,.0f} tok/s' if made > 1 else '-'
print(f'prefill: {len(ids):,} tokens, {len(ids) / (prefilled - start):,.0f} tok/s; '
      f'decode: {made * num_samples:,} tokens, {decode}', file=sys.stderr)
