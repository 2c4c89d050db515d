# python results/machine_python/data.py && python train.py config/bytes_71m.py
# Its attention arm: python train.py config/bytes_71m.py --pattern=A --learning_rate=2.3e-3 --out_dir=out_bytes_71m_attention
# Python sources as bytes, 71M parameters, six minutes on an H200. Books as bytes: --dataset=books_bytes after
# python results/books/data.py TRAIN.jsonl.xz VAL.jsonl.xz bytes
dataset = 'machine_python'
out_dir = 'out_bytes_71m'
n_layer = 12
n_embd = 768
n_head = 12
n_modes = 512
chunk_size = 256  # for a GPU
block_size = 4096
batch_tokens = 32_768  # 8 sequences of 4,096
micro_batch_size = 8
max_tokens = 150_732_800  # 4,600 steps
max_seconds = 0
optimizer = 'muon'
learning_rate = 4.5e-3
warmup_iters = 60
min_lr_frac = 0.05
eval_interval = 400
eval_tokens = 262_144
save_seconds = 0  # only at the end
