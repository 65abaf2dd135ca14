"""Which sizes of heads the attention kernels take. No torch: `tidewright plan` asks, too."""

LARGEST_HEAD = 256


def takes_head(head_dim: int) -> bool:
    return head_dim <= LARGEST_HEAD and head_dim % 2 == 0
