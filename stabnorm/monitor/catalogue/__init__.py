"""The statistics by family, each with its formula; `stabnorm.monitor.statistics` puts them together."""
