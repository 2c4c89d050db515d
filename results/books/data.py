"""
Books in English as data/books (GPT-2 tokens) or data/books_bytes: training and validation by different authors, from two files of
json lines with a field `text`, which books.json names. Books of the public domain are at gutenberg.org.

    python results/books/data.py TRAIN.jsonl.xz VAL.jsonl.xz gpt2
    python results/books/data.py TRAIN.jsonl.xz VAL.jsonl.xz bytes
"""
import hashlib
import json
import lzma
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
import prepare  # noqa: E402


def documents(path):
    with lzma.open(path, 'rt', encoding='utf-8') as file:
        for line in file:
            yield json.loads(line)['text']


*paths, tokenizer = sys.argv[1:]
digests = [hashlib.sha256(open(path, 'rb').read()).hexdigest() for path in paths]
texts = dict(zip(('train', 'val'), map(documents, paths)))
prepare.make_from(texts, 'data/books' + ('_bytes' if tokenizer == 'bytes' else ''), tokenizer, {'dataset': 'books', 'source': digests})
