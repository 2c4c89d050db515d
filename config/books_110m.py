# python results/books/data.py TRAIN.jsonl.xz VAL.jsonl.xz gpt2 && python train.py config/books_110m.py
# Its attention arm: python train.py config/books_110m.py --pattern=A --learning_rate=2.4e-3 --out_dir=out_books_110m_attention
# Books in English as GPT-2 tokens, four times; 110M parameters, six minutes on an H200.
dataset = 'books'
out_dir = 'out_books_110m'
n_layer = 12
n_embd = 768
n_head = 12
n_modes = 512
chunk_size = 256  # for a GPU
block_size = 2048
batch_tokens = 32_768  # 16 sequences of 2,048
micro_batch_size = 16
max_tokens = 104_857_600  # 3,200 steps
max_seconds = 0
optimizer = 'muon'
learning_rate = 3e-3
warmup_iters = 60
min_lr_frac = 0.05
weight_decay = 1.6  # text that is read four times needs much of it
eval_interval = 400
eval_tokens = 262_144
save_seconds = 0  # only at the end
