"""The commands of `orthoshard`. They import the library; the library never imports them. Extra: ``lab``."""
