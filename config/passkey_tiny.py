# python eval.py --make_passkey=data/passkey && python train.py config/passkey_tiny.py && python eval.py --suite=needle --checkpoint=out_passkey_tiny --needle_lengths=128,192,250,512,1024,2048 --out=results/passkey_tiny
# A model that finds a passkey in its context: what eval.py's needle suite shows when there is something to show.
dataset = 'passkey'
out_dir = 'out_passkey_tiny'
block_size = 256  # a prompt of 250 and its answer
pattern = 'SL'
n_layer = 2
n_embd = 128
n_head = 4
n_modes = 256  # the slowest gates start with a memory of as many tokens
batch_tokens = 1024  # few: it takes thousands of steps before any key is found
max_seconds = 450
optimizer = 'adamw'
learning_rate = 1e-2
eval_interval = 1000
dtype = 'float32'
