"""The commands of `orthoshard`: applications, which import the library and are never imported by it. Extra: ``lab``."""
