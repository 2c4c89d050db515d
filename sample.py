"""
Text out of a trained model: the prompt is read once, then every token costs the same, and is shown as it is made.

    python sample.py                                          the newest checkpoint of the default run, from nothing
    python sample.py --out_dir=out-gpt --prompt="def main(" --num_samples=3
    cat long.txt | python sample.py --prompt=- --max_new_tokens=1000 --stop=$'\\n\\n'

Text goes to stdout, speeds to stderr.
"""

import codecs
import json
import os
import select
import signal
import stat
import sys
import time

import torch

from configurator import configure, die
from model import load_model, repeat_state
from prepare import get_tokenizer

# ---------------------------------------------------------------------------------------------------------------------
out_dir = 'out'  # a folder of checkpoints (the newest is taken), or one checkpoint
prompt = '<|endoftext|>'  # text to go on from; - or a pipe: stdin; <|endoftext|>: nothing, the start of a document
prompt_file = ''  # read the prompt from this file; - reads stdin
num_samples = 1  # texts from the same prompt, which is read once
max_new_tokens = 500  # length of each
temperature = 0.8  # 0: always the most probable token
top_k = 0  # only from the k most probable tokens; 0: off
top_p = 0.95  # only from the most probable tokens that together have this probability; 1: off
stop = ''  # end where this text appears, and leave it out; several as JSON: '["\nclass ", "\ndef "]'
stop_at_end = True  # end at <|endoftext|>
seed = 1337  # the same seed, the same text
device = 'auto'  # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'  # of the weights: auto (bfloat16 on CUDA, else float32), float32, bfloat16, float16
compile = False  # torch.compile the decoding step: ten seconds on a CPU, a minute on CUDA, then 1.7 times the speed
config = configure(globals())
globals().update(config)
# ---------------------------------------------------------------------------------------------------------------------

for key, low, high in (('num_samples', 1, 1e6), ('max_new_tokens', 1, 1e15), ('temperature', 0, 1e6),
                       ('top_k', 0, 1e15), ('top_p', 1e-9, 1), ('seed', 0, 1e18)):
    if not low <= config[key] <= high:
        die(f'{key}={config[key]}: expected {low} to {high:g}')
if device == 'auto':
    device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
device_type = device.split(':')[0]
if device_type not in ('cpu', 'cuda', 'mps') or not getattr(torch, device_type).is_available():
    die(f'device={device!r}: not available here (auto, cpu, cuda, cuda:1, mps)')
if dtype == 'auto':
    dtype = 'bfloat16' if device_type == 'cuda' else 'float32'
if dtype not in ('float32', 'bfloat16', 'float16'):
    die(f'dtype={dtype!r}: expected one of auto, float32, bfloat16, float16')
try:
    stops = json.loads(stop)
except ValueError:
    stops = None
if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
    stops = [stop] if stop else []


def one_line(kind, error, trace):
    if issubclass(kind, (RuntimeError, MemoryError)):  # weights that are not finite, a device without memory
        die(f'{out_dir} on {device}: {str(error) or kind.__name__}', code=1)
    sys.__excepthook__(kind, error, trace)


sys.excepthook = one_line
for name in ('SIGINT', 'SIGPIPE'):  # Ctrl-C, or a reader that has seen enough (head): end quietly
    if hasattr(signal, name):
        signal.signal(getattr(signal, name), signal.SIG_DFL)

# -- the prompt, as bytes: those of a file may be no UTF-8
def waiting():
    """Whether stdin is a file, or a pipe with something in it (one that stays silent is not waited for)"""
    try:
        mode = os.fstat(0).st_mode
        return stat.S_ISREG(mode) or stat.S_ISFIFO(mode) and select.select([0], [], [], 0)[0]
    except OSError:
        return False


text = None if prompt == '<|endoftext|>' else os.fsencode(prompt)
if '-' in (prompt, prompt_file):
    text = sys.stdin.buffer.read()
elif prompt_file:
    try:
        with open(prompt_file, 'rb') as file:
            text = file.read()
    except OSError as e:
        die(f'prompt_file={prompt_file!r}: {e.strerror}')
elif text is None and waiting():
    text = sys.stdin.buffer.read() or None
if text == b'':
    die('the prompt is empty: give some text, or leave it out to start a document')

try:
    model, state, manifest = load_model(out_dir, device)
    tokenizer = get_tokenizer(manifest['tokenizer'])
    if tokenizer.vocab_size != model.config.vocab_size:
        die(f'{out_dir}: a vocabulary of {model.config.vocab_size} does not fit its tokenizer {tokenizer.name}')
except (ValueError, KeyError, OSError) as e:  # CheckpointError and DataError are ValueErrors
    die(f'{e}' + ('; train one with `python train.py`' if not os.path.exists(out_dir) else ''))
del state
model.to(getattr(torch, dtype))
if compile:
    model.compile_step(num_samples)
    model.step(torch.zeros(num_samples, dtype=torch.long, device=device), model.init_state(num_samples))  # compiles
ids = [tokenizer.eot] if text is None else tokenizer.encode_bytes(text)
model.eval()


class Printer:
    """Text of one sample as it grows: bytes wait until they are a character, text until it cannot be part of a stop."""

    def __init__(self, write):
        self.write, self.held, self.done = write, '', False
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace')

    def add(self, token):
        if token == tokenizer.eot and stop_at_end:
            return self.end()
        self.show(self.decoder.decode(tokenizer.decode_bytes([token])))

    def show(self, text, last=False):
        self.held += text
        found = [i for i in map(self.held.find, stops) if i >= 0]
        hold = 0 if last else max((n for s in stops for n in range(1, len(s)) if self.held.endswith(s[:n])), default=0)
        cut = min(found) if found else len(self.held) - hold
        self.write(self.held[:cut])
        self.held, self.done = self.held[cut:], bool(found) or last

    def end(self):
        if not self.done:
            self.show(self.decoder.decode(b'', final=True), last=True)


def write(text):
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()


with torch.inference_mode():
    start, made = time.perf_counter(), 0
    state = model.init_state(1)
    if len(ids) > 1:
        _, state = model.prefill(torch.tensor([ids[:-1]], device=device), state)
    last = torch.tensor([ids[-1:]] * num_samples, device=device)
    texts = [[] for _ in range(num_samples)]  # one is shown while it is made, several are shown after each other
    printers = [Printer(write if num_samples == 1 else parts.append) for parts in texts]
    for printer in printers:
        printer.write(printer.decoder.decode(text or b''))
    for row in model.generate(last, max_new_tokens, temperature if temperature > 1e-4 else 0, top_k, top_p,
                              torch.Generator(device).manual_seed(seed), repeat_state(state, num_samples)):
        for printer, token in zip(printers, row.tolist()):
            if not printer.done:
                printer.add(token)
        prefilled = time.perf_counter() if made == 0 else prefilled
        made += 1
        if all(printer.done for printer in printers):
            break
    seconds = time.perf_counter() - prefilled
for printer in printers:
    printer.end()
for i, parts in enumerate(texts):
    write((f'{"-" * 40} {i + 1} of {num_samples}\n' if num_samples > 1 else '') + ''.join(parts) + '\n')
decode = f'{(made - 1) * num_samples / seconds:,.0f} tok/s' if made > 1 else '-'
print(f'prefill: {len(ids):,} token{"s" * (len(ids) > 1)}, {len(ids) / (prefilled - start):,.0f} tok/s; '
      f'decode: {made * num_samples:,} tokens, {decode}', file=sys.stderr)
