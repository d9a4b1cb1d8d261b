"""The statistics by family, each with its formula; `stabnorm.monitor.statistics` makes one catalogue of them."""
