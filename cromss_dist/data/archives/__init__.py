"""Archives as they come, each behind the `Source` protocol of `cromss_dist.data.sample`."""
