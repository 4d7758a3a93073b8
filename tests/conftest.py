import torch

# The models here are so small that threads cost more than they bring.
torch.set_num_threads(1)
