# python prepare.py && torchrun --standalone --nproc_per_node=8 train.py config/fela_1b.py
# Across two nodes, on each: torchrun --nnodes=2 --node_rank=$RANK --nproc_per_node=8 \
#     --master_addr=$MASTER_IP --master_port=29500 train.py config/fela_1b.py
# The paper's main model: 1.13B parameters, 22B tokens.
dataset = 'openwebtext'
out_dir = 'out_fela_1b'
n_layer = 24
n_embd = 2048
n_head = 16
gla_heads = 4  # the paper has 16: few, wide heads remember more
n_modes = 512
chunk_size = 256  # for a GPU
mlp_hidden = 4416  # 24 * ((3.6875 + 3 * 2.156) * 2048^2) + 50304 * 2048 = 1.13e9
block_size = 2048
batch_tokens = 196_608  # 96 sequences of 2,048
micro_batch_size = 4  # 96 = 8 GPUs * 4 sequences * 3 micro-steps; also divides for 1, 2, 4, 6 and 12 GPUs
max_iters = 111_897  # * 196,608 = 22e9 tokens
max_seconds = 0
optimizer = 'adamw'
min_lr_frac = 0.1
schedule = 'cosine'
learning_rate = 3e-4
warmup_iters = 2000
weight_decay = 0.1
eval_interval = 1000
save_interval = 1000
