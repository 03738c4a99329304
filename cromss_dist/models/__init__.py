"""Models: the two-branch U-Net and its encoders.

The call below is the package's one deliberate action at import time: it has to come before the first import of timm
or segmentation-models-pytorch, in every process, and whoever imports a module of this folder passes here first.
"""

from cromss_dist.models.torchvision_ops import declare_missing_operators

declare_missing_operators()
