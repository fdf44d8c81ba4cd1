"""Storage drivers: one contract (:mod:`agent_image.drivers.base`), chosen by name (:mod:`agent_image.drivers.registry`)."""
