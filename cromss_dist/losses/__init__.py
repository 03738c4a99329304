from cromss_dist.config import LossConfig
from cromss_dist.losses.cromss import CromssLoss, LossOutput

__all__ = ["CromssLoss", "LossConfig", "LossOutput"]
