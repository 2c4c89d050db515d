"""
Curves of two runs, and what longer contexts give them: results/books_110m/curves.png from the folders of the runs (their
metrics.jsonl) and of their evaluations (longctx_bpb.csv).

    python results/curves.py results/books_110m/curves.png FELA=out_books_110m,results/books_110m \
        attention=out_books_110m_attention,out_books_110m_attention/eval
"""
import csv
import json
import sys

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout='constrained')
for arm, color in zip(sys.argv[2:], ('C0', 'C1')):
    name, _, folders = arm.partition('=')
    run, evaluation = folders.split(',')
    rows = [json.loads(line) for line in open(f'{run}/metrics.jsonl')]
    for key, style, label in (('loss', ':', 'training'), ('val_loss', 'o-', 'validation')):
        points = [(row['tokens'] / 1e6, row[key]) for row in rows if row.get(key)]
        left.plot(*zip(*points), style, color=color, markersize=4, label=f'{name}, {label}')
    with open(f'{evaluation}/longctx_bpb.csv') as file:
        points = [[float(row[key]) for key in ('context_tokens', 'bpb', 'bpb_low', 'bpb_high')] for row in csv.DictReader(file)]
    context, bpb, low, high = zip(*points)
    right.plot(context, bpb, 'o-', color=color, markersize=4, label=name)
    right.fill_between(context, low, high, color=color, alpha=0.12, linewidth=0)
losses = sorted(row['val_loss'] for row in rows if row.get('val_loss'))
left.set(xlabel='million tokens', ylabel='nats per token', ylim=(losses[0] * 0.6, losses[-1] * 1.15))
right.set(xlabel='context (tokens, K = 1,024)', ylabel='bits per byte', xscale='log')
right.set_xticks(context, [f'{n / 1024:.4g}K' for n in context])
right.set_xticks([], minor=True)
for ax in (left, right):
    ax.legend(frameon=False)
    ax.grid(alpha=0.25)
fig.savefig(sys.argv[1], dpi=120)
