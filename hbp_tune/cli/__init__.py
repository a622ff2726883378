"""The ``hbp`` command: torchtune's own, extended by our recipes and configurations, and by what comes before a run."""
