"""Which files an archive has, packed or not, and the bytes of one."""
