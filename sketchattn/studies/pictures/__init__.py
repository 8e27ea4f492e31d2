"""Pictures of a study, a file each, and the curves and axes that they share."""
