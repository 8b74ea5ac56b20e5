"""Whether torch.autocast is on."""

import torch


def autocasts(x: torch.Tensor) -> bool:
    """Whether autocast would convert ``x``, which is on some device, for a product.

    Example:
        >>> with torch.autocast("cpu"):
        ...     autocasts(torch.ones(1)), autocasts(torch.ones(1, device="meta"))
        (True, False)
    """
    device = x.device.type
    # there is no autocast on the meta device, and asking for its state is an error
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.is_floating_point()
