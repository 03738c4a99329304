from cromss_dist.config import LossConfig
from cromss_dist.losses.counts import Counts
from cromss_dist.losses.cromss import CromssLoss, LossOutput

__all__ = ["Counts", "CromssLoss", "LossConfig", "LossOutput"]
