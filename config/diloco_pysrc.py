# torchrun --standalone --nproc_per_node=4 train_diloco.py config/diloco_pysrc.py
# DiLoCo on one machine: four workers, a model of 0.2M parameters, Python's standard library as bytes.
run_name = 'diloco-pysrc'
dataset = 'pysrc'
n_embd = 64
n_modes = 64
block_size = 128
micro_batch_size = 16
batch_tokens = 2048  # 16 x 128 of each worker, 8,192 of four
H = 50
max_tokens = 16_384_000  # 2,000 inner steps x 8,192, in 40 rounds of 50
learning_rate = 4e-3
warmup_iters = 200  # four rounds: workers that start from noise must not drift far
timeout = 120.0  # a round takes a few seconds
