# curl -LO https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt && python prepare.py --data_files=input.txt --dataset=shakespeare --tokenizer=bytes && python train.py config/shakespeare.py
# nanoGPT's setting for a laptop: 4 layers, context 64, batch 12, 2,000 steps; attention: --pattern=A --out_dir=out_shakespeare_a.
dataset = 'shakespeare'
out_dir = 'out_shakespeare'
n_layer = 4
n_head = 4
n_embd = 128
n_modes = 64
mlp_hidden = 352  # 0.84M parameters
block_size = 64
batch_tokens = 768  # 12 sequences of 64
micro_batch_size = 12
max_iters = 2000
max_seconds = 0
optimizer = 'muon'
learning_rate = 5e-3
warmup_iters = 100
min_lr_frac = 0.1
beta2 = 0.99
dtype = 'float32'
eval_interval = 500
