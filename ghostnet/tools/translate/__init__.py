"""Commands of the reference as commands of this project, and the other way round."""
