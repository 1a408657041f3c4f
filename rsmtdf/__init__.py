"""rsmtdf: land-cover maps from a few labels, by distilling cached vision foundation models.

A store of teacher features is made once (`rsmtdf cache-features`), a small student is trained from it
(`rsmtdf train`). See `README.md` for the file map.
"""

__version__ = "0.1.0"
