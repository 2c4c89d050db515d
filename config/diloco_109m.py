# On each of ten machines: python prepare.py && torchrun --nnodes=10 --node_rank=$RANK --nproc_per_node=1 \
#     --master_addr=$MASTER_IP --master_port=29500 train_diloco.py config/diloco_109m.py
# The paper's CPU run: 109M parameters, 1.5B tokens on 10 c7i.4xlarge, 1,500 steps.
run_name = 'diloco-109m'
dataset = 'openwebtext'
n_layer = 12
gla_heads = 1  # one wide head remembers more than several
n_embd = 768
n_modes = 512
block_size = 1024
micro_batch_size = 8
batch_tokens = 98_304  # 96 x 1,024 of each worker; 983,040 of ten
H = 50  # a round is 49,152,000 tokens
max_tokens = 1_500_000_000  # 1,526 inner steps of ten workers: 30.5 rounds
warmup_rounds = 1  # the first round matters most; 0 sends 100 times less, 1 sends 23
warmup_iters = 100
learning_rate = 6e-4
outer_dtype = 'bf16'
eval_rounds = 2
timeout = 7200.0  # a round takes 4,915,200 tokens / (1,000 to 3,000 tokens/s of one machine) = 27 to 82 minutes
upload_rounds = 1
