"""Where `ProgressiveSwitch` was in 0.1.0; import it from `stabnorm`."""

from stabnorm.switch.progressive import ProgressiveSwitch as ProgressiveSwitch
