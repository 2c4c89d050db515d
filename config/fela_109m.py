# python prepare.py && python train.py config/fela_109m.py --chunk_size=64 --out_dir=out_fela_109m_64
# The paper's ablation trains with chunks of 64, 256, 512 and 1024: one function; from 256 on also one speed.
# The paper's 109M shape with GPT-2's vocabulary: 12 * 10 * 768^2 + 50304 * 768 = 109e6.
dataset = 'openwebtext'
out_dir = 'out_fela_109m'
n_layer = 12
n_embd = 768
n_head = 12
n_modes = 512
chunk_size = 256  # for a GPU
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
