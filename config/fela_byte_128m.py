# python prepare.py --hf_dataset=Skylion007/openwebtext --dataset=openwebtext_bytes --tokenizer=bytes && torchrun --standalone --nproc_per_node=8 train.py config/fela_byte_128m.py
# The paper's byte-level model: 128M parameters, no tokenizer, a context of 16,384 bytes, 5e9 bytes.
dataset = 'openwebtext_bytes'
out_dir = 'out_fela_byte_128m'
n_layer = 12
n_embd = 1024
n_head = 16
n_modes = 512
chunk_size = 256  # for a GPU
mlp_hidden = 2112  # 12 * ((3.5 + 0.375 + 3 * 2.0625) * 1024^2) + 261 * 1024 = 127e6
block_size = 16_384
batch_tokens = 131_072  # 8 sequences of 16,384
micro_batch_size = 1
max_iters = 38_146  # * 131,072 = 5e9 bytes
max_seconds = 0
optimizer = 'adamw'
min_lr_frac = 0.1
learning_rate = 6e-4
warmup_iters = 700
eval_interval = 500
save_interval = 500
