"""
Text out of a trained model: the prompt is read once, then each token costs the same and is shown when made.

    python sample.py                                the newest checkpoint of the default run, from nothing
    python sample.py --out_dir=out_gpt --prompt="def main(" --num_samples=3
    cat long.txt | python sample.py --prompt=- --max_new_tokens=1000 2> speeds.txt
"""
import codecs
import json
import os
import signal
import sys
from contextlib import suppress
from time import perf_counter

import torch

from configurator import configure, die, pick_device, require
from model import CheckpointError, load_model, repeat_state
from prepare import DataError, get_tokenizer

# -----------------------------------------------------------------------------------------------------------
out_dir = 'out'  # a folder of checkpoints (the newest is taken), or one checkpoint
prompt = '<|endoftext|>'  # text to go on from; -: stdin. <|endoftext|> in it is the token between documents
prompt_file = ''  # read the prompt from this file
echo = 1000  # a prompt of at most so many bytes is shown before the text
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

require(config, num_samples=(1, 1e6), max_new_tokens=(1, 1e15), top_p=(1e-9, 1),
        dtype='auto float32 bfloat16 float16')
signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends quietly
if hasattr(signal, 'SIGPIPE'):  # so does a reader that has seen enough
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
stops = [stop] if stop else []
with suppress(ValueError):  # no JSON: a text
    if stop.startswith('["'):
        stops = [str(text) for text in json.loads(stop) if text]


def one_line(kind, error, trace):
    if isinstance(error, (CheckpointError, DataError, OSError)):
        die(error if os.path.exists(out_dir) else f'{error} ({out_dir=}); train one with `python train.py`')
    if isinstance(error, RuntimeError):  # weights that are not finite, a device without memory
        die(f'{out_dir} on {device}: {error!s:.200}', 1)
    sys.__excepthook__(kind, error, trace)


sys.excepthook = one_line
text = sys.stdin.buffer.read() if prompt == '-' else os.fsencode(prompt)
if prompt_file:
    with open(prompt_file, 'rb') as file:
        text = file.read()
if not text:
    die('the prompt is empty: give some text, or leave it out to start a document')
device, fast, _ = pick_device(device, dtype)
model, state, manifest = load_model(out_dir, device)
model.eval().to(getattr(torch, fast if dtype != 'auto' or 'cuda' in device else 'float32'))
if compile:
    model.compile_blocks()
tokenizer = get_tokenizer(manifest['tokenizer'])
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
    data = text.encode()
    try:
        while data:
            data = data[os.write(1, data):]
    except OSError as e:
        die(f'stdout: {e.strerror}', 1)


texts = [[] for _ in range(num_samples)]  # one is shown while it is made, several are shown after each other
printers = [Printer(write if num_samples == 1 else parts.append) for parts in texts]
for printer in printers if len(text) <= echo else ():
    printer.write(printer.decoder.decode(text.removeprefix(b'<|endoftext|>')))
times, state = [perf_counter()], None  # then after every token
if len(ids) > 1:
    state = repeat_state(model.prefill(torch.tensor([ids[:-1]], device=device))[1], num_samples)
temperature = temperature if temperature > 1e-4 else 0
for row in model.stream(torch.tensor([ids[-1:]] * num_samples, device=device), max_new_tokens, temperature,
                        top_k, top_p, torch.Generator(device).manual_seed(seed), state):
    for printer, token in zip(printers, row.tolist()):
        if not printer.done:
            last = token == tokenizer.eot and stop_at_end
            printer.add(b'' if last else tokenizer.decode_bytes([token]), last)
    times.append(perf_counter())
    if all(printer.done for printer in printers):
        break
for i, (printer, parts) in enumerate(zip(printers, texts)):
    if not printer.done:
        printer.add(b'', last=True)
    write((f'{"-" * 40} {i + 1} of {num_samples}\n' if num_samples > 1 else '') + ''.join(parts) + '\n')
made = len(times) - 1
print(f'prefill: {len(ids):,} tokens, {times[1] - times[0]:.2f} s; decode: '
      f'{made * num_samples:,} tokens, {(made - 1) * num_samples / (times[-1] - times[1] + 1e-9):,.0f} tok/s',
      file=sys.stderr)
