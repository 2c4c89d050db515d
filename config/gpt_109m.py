# python prepare.py && python train.py config/gpt_109m.py
# The baseline arm at the 109M shape: softmax attention in every layer, everything else as in fela_109m.
dataset = 'openwebtext'
out_dir = 'out_gpt_109m'
pattern = 'A'
n_layer = 12
n_embd = 768
n_head = 12
block_size = 1024
batch_tokens = 196_608  # 192 sequences of 1,024
micro_batch_size = 8
max_iters = 15_000  # * 196,608 = 2.9e9 tokens
max_seconds = 0
optimizer = 'adamw'
min_lr_frac = 0.1
learning_rate = 6e-4
warmup_iters = 700
eval_interval = 500
save_interval = 500
