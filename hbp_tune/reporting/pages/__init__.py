"""Pages that people read: charts as SVG, the plan's page and the run's."""
