"""Results as GeoJSON, which QuPath imports: outlines of masks, boxes, and tiles with their values.

Outlines run along the edges of pixels, so that they enclose the pixels of a region and no others.
They are found from corners alone. Along a row of the grid, the corners of a region that follow one
another are, two by two, the ends of its horizontal edges; along a column those of its vertical
ones. Going along a row and a column in turn leads around the ring.
"""

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from diffaugkit.arrays import refuse_missing, some, to_numpy
from diffaugkit.metrics.detection import check_boxes
from diffaugkit.metrics.segmentation import check_objects, label_instances
from diffaugkit.plotting import PALETTE

__all__ = ["to_geojson"]

_TYPES = ("annotation", "detection", "tile")
_COLUMNS = ["slide", "row", "column", "height", "width"]
# A box's corners (x, y) from (x_min, y_min, x_max, y_max), around it and back to the first.
_AROUND = [0, 1, 2, 1, 2, 3, 0, 3, 0, 1]


def to_geojson(
    objects,
    path=None,
    *,
    instances=False,
    names=None,
    values=None,
    scale=1.0,
    offset=(0, 0),
    slide=None,
    object_type=None,
):
    """Hand masks, boxes or tiles over to QuPath, as a GeoJSON file.

    In QuPath (0.4 or later) open the image, then drop the file on it, or take File > Import objects
    from file.

    Parameters
    ----------
    objects : mask, boxes of one image, or tiles
        - bool or int array-like of shape (h, w): a mask, 0 the background. What
          ``DiffusionSegmenter.predict`` gives for an image.
        - dict with "boxes" of shape (n, 4) as (x_min, y_min, x_max, y_max), and if there are any
          "labels" and "scores" of shape (n,): what ``DiffusionDetector.predict`` and
          :func:`boxes_from_masks` give for an image. Scores become the measurement "score".
        - :class:`TissueTiles`, or its `table` or rows of that.
    path : str, path-like or None, default=None
        File to write, or write over, such as "case1.geojson". None returns the dict.
    instances : bool, default=False
        What the numbers of a mask are. False: classes, whose connected regions (pixels that touch
        at a corner, too) are the objects. True: numbers of objects, as of
        :func:`~diffaugkit.metrics.label_instances`, each of which may lie in several pieces.
    names : str, mapping, sequence of str or None, default=None
        Classes that QuPath shows. A str: that of all objects. A mapping: from the labels of the
        mask or the boxes, such as ``{1: "Tumor", 2: "Stroma"}``; with it a class has the same
        colour in all files. A sequence: one for each box, tile, or object of a mask by ascending
        number. None: the labels; none for tiles and `instances`.
    values : mapping or DataFrame, or None, default=None
        Measurements: an array of one number for each box, tile, or object of a mask by ascending
        number, under its name, as ``{"attention": attention}``. What is NaN or infinite is left
        out.
    scale : float or (float, float), default=1.0
        Pixels of the image at full resolution for one pixel of `objects`; also (x, y). Tiles are at
        full resolution already.
    offset : (float, float), default=(0, 0)
        Where the upper left corner of `objects` lies in the image: (x, y) in pixels of full
        resolution.
    slide : str, int or None, default=None
        Which slide's tiles; needed where there are several. Names and values are of all tiles.
    object_type : {"annotation", "detection", "tile"} or None, default=None
        Kind of object in QuPath. None: annotations for classes of a mask, which can be edited;
        detections for numbered objects and boxes; tiles for tiles.

    Returns
    -------
    dict or None
        The FeatureCollection, where `path` is None.

    Raises
    ------
    ValueError
        For anything else in place of a mask, boxes or tiles, such as probabilities or several
        images; names or values that are not one for each object, or miss a label; values for a mask
        of classes; tiles of several slides without `slide`; numbers out of range.
    OSError
        If the file cannot be written: what was there before is left.

    Warns
    -----
    UserWarning
        If with `instances` the mask holds one label, such as 255, in several regions.

    See Also
    --------
    TissueTiles.plot : Draws values of tiles without QuPath.

    Notes
    -----
    Coordinates are x to the right and y down from the upper left corner of the image, in pixels of
    full resolution, to a thousandth; the pixel in row i and column j covers (j, i, j + 1, i + 1).
    An outline encloses exactly the pixels of its region. Parts that touch at a corner are polygons
    of a MultiPolygon, and rings never cross or touch themselves, as OGC's rules want it. Taken as
    numbers, borders run counterclockwise and holes clockwise (RFC 7946, section 3.1.6); on a
    screen, whose y points down, it is the other way round.

    Of slides with empty margins (such as MRXS) QuPath shows what lies within the bounds that
    OpenSlide tells; there `offset` must be minus its ``bounds-x`` and ``bounds-y``.

    A mask of 4000 x 4000 pixels with 10 000 nuclei takes 4 s of one core, and 0.3 GB beside it; the
    file has 9 MB.

    References
    ----------
    .. [1] Bankhead et al. 2017, "QuPath: Open source software for digital pathology image
       analysis", Scientific Reports; https://qupath.readthedocs.io, "Exporting annotations".
    .. [2] Butler et al. 2016, "The GeoJSON Format", RFC 7946.

    Examples
    --------
    >>> from diffaugkit import to_geojson
    >>> found = to_geojson([[0, 1, 1], [0, 0, 0]], names={1: "Tumor"}, scale=4)
    >>> found["features"][0]["geometry"]["coordinates"]
    [[[4, 0], [12, 0], [12, 4], [4, 4], [4, 0]]]
    >>> found["features"][0]["properties"]["classification"]
    {'name': 'Tumor', 'color': [0, 114, 178]}
    """
    is_tiles = hasattr(objects, "table") or hasattr(objects, "columns")
    is_mask = not is_tiles and not isinstance(objects, dict)
    if instances and not is_mask:
        raise ValueError("instances=True is for masks: boxes and tiles are objects already.")
    if slide is not None and not is_tiles:
        raise ValueError(f"slide={slide!r} is for tiles; a mask and boxes are of one image.")
    if object_type not in (None, *_TYPES):
        raise ValueError(f"object_type={object_type!r} must be one of {some(_TYPES)}, or None.")
    path, place = _checked_path(path), _placing(scale, offset)
    if is_mask:
        mask, labels = _read_mask(objects, instances)
        n, kind = len(labels), "detection" if instances else "annotation"
        if not instances and not (values is None and isinstance(names, str | Mapping | None)):
            raise ValueError(
                "The regions of a mask of classes have no order that values and names could "
                "follow: name classes by a mapping, or give label_instances(mask) with "
                "instances=True."
            )
    elif is_tiles:
        boxes, rows, n = _read_tiles(objects, slide)
        kind, labels = "tile", None
    else:
        (found,) = check_boxes([objects])
        boxes, labels, n = found["boxes"], found["labels"].tolist(), len(found["boxes"])
        rows, kind = range(n), "detection"
        if objects.get("scores") is not None:
            values = {"score": objects["scores"], **_columns(values)}
    unnamed = names is None and (is_tiles or instances)
    classes = [None] * n if unnamed else _read_names(names, labels, n)
    measured = _read_values(values, n)

    if is_mask:
        outlines = _mask_outlines(mask, labels, instances, place)
    else:
        rings = place(boxes[:, _AROUND].reshape(-1, 5, 2))
        outlines = [(row, [[ring]]) for row, ring in zip(rows, rings, strict=True)]
    features = [
        _feature(object_type or kind, polygons, classes[row], measured[row])
        for row, polygons in outlines
    ]
    collection = {"type": "FeatureCollection", "features": features}
    if path is None:
        return collection
    _write(path, json.dumps(collection, allow_nan=False, separators=(",", ":")))
    return None


def _feature(object_type, polygons, of_class, measurements):
    """Make a feature of polygons, each of them a list of closed rings, the border first."""
    several = len(polygons) > 1
    properties = {"objectType": object_type}
    if of_class is not None:
        name, color = of_class
        properties["classification"] = {"name": name, "color": [*color]}
    if measurements:
        properties["measurements"] = measurements
    return {
        "type": "Feature",
        "geometry": {
            "type": "MultiPolygon" if several else "Polygon",
            "coordinates": polygons if several else polygons[0],
        },
        "properties": properties,
    }


# ---- outlines ------------------------------------------------------------------------------------


def _mask_outlines(mask, labels, instances, place):
    """Yield the row in `labels`, and the polygons, of each object of a mask."""
    # Pixels that touch at a corner make one object but several polygons.
    objects = mask if instances else label_instances(mask)
    corners, pieces = _trace(label_instances(objects, connectivity=1))
    points, found, row_of = place(corners), {}, {label: row for row, label in enumerate(labels)}
    for rings in pieces:
        # The first corner is the upper left one of a pixel of the piece.
        x, y = corners[rings[0][0]]
        polygon = [[*(points[at] for at in ring), [*points[ring[0]]]] for ring in rings]
        _, polygons = found.setdefault(int(objects[y, x]), (row_of[int(mask[y, x])], []))
        polygons.append(polygon)
    for number in sorted(found):
        yield found[number]


def _trace(pieces):
    """Find the rings around pieces of connected pixels, and around the holes in them.

    Parameters
    ----------
    pieces : int ndarray of shape (h, w)
        Numbers of the pieces; pixels of one are connected by their sides. 0 is the background.

    Returns
    -------
    corners : ndarray of shape (n, 2)
        x and y.
    rings : list of list of list of int
        Of each piece its rings, the border first, as rows of `corners`.
    """
    around = np.pad(pieces, 1)
    # Of each crossing of the grid the four pixels around it, by where they lie: down, right.
    quarters = {
        (-1, -1): around[:-1, :-1],
        (-1, 1): around[:-1, 1:],
        (1, -1): around[1:, :-1],
        (1, 1): around[1:, 1:],
    }
    found = []
    for (down, right), own in quarters.items():
        beside, above = own == quarters[down, -right], own == quarters[-down, right]
        across = own == quarters[-down, -right]
        # A ring turns where a pixel has neither neighbour, or both but not the pixel across.
        y, x = np.nonzero((own != 0) & (beside == above) & ~(beside & across))
        beside, across = beside[y, x], across[y, x]
        # Which way the two edges go that meet here: along the pixel, or along the one across. Where
        # two pixels of a piece touch at a corner, they exchange an edge, so that each ring follows
        # what is outside. That never comes back: the piece, connected elsewhere, is in between.
        horizontal = np.where(beside, -right, right)
        vertical = np.where(beside | across, -down, down)
        found.append((own[y, x], y, x, horizontal, vertical))
    piece, y, x, horizontal, vertical = np.concatenate(found, axis=1)
    order = np.lexsort((horizontal, x, y, piece))
    # In this order the ends of a horizontal edge are neighbours: i and i ^ 1.
    piece, y, x, vertical = piece[order], y[order], x[order], vertical[order]
    ends = np.lexsort((vertical, y, x, piece)).reshape(-1, 2)
    partner = np.empty(len(piece), np.int64)
    partner[ends] = ends[:, ::-1]  # at the other end of the vertical edge

    rings, last, seen = [], 0, bytearray(len(piece))
    piece, partner = piece.tolist(), partner.tolist()
    for start in range(0, len(piece), 2):
        ring, at = [], start
        while not seen[at]:
            seen[at] = seen[at ^ 1] = True
            ring += at, at ^ 1
            at = partner[at ^ 1]
        if ring and piece[start] != last:  # its first corner, the uppermost, is of the border
            rings.append([ring])
            last = piece[start]
        elif ring:
            rings[-1].append(ring[::-1])
    return np.column_stack([x, y]), rings


def _placing(scale, offset):
    """Return a function from points (..., 2) to nested lists of coordinates in the image."""
    pairs = {}
    for name, given in (("scale", scale), ("offset", offset)):
        try:
            pairs[name] = np.broadcast_to(np.asarray(given, np.float64), 2)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}={given!r} must be a number, or two: x and y.") from error
        if not np.isfinite(pairs[name]).all():
            raise ValueError(f"{name}={given!r} must be finite.")
    if (pairs["scale"] <= 0).any():
        raise ValueError(f"scale={scale!r} must be above 0.")

    def place(points):
        points = np.round(points * pairs["scale"] + pairs["offset"], 3)
        return (points if (points % 1).any() else points.astype(np.int64)).tolist()

    return place


# ---- input ---------------------------------------------------------------------------------------


def _read_mask(mask, instances):
    """Return a mask (h, w) and the list of its labels, sorted."""
    mask = np.asarray(to_numpy(mask))
    if mask.ndim != 2 or mask.dtype.kind not in "biu" or not mask.size:
        raise ValueError(
            f"objects has shape {mask.shape} and dtype {mask.dtype}. Give a mask of one image, (h, "
            "w) of whole numbers: of predict(images) an entry, of probabilities the argmax. Or "
            "{'boxes': array of shape (n, 4)}, or TissueTiles."
        )
    if instances:
        check_objects([mask], "objects")
    mask = mask.astype(np.uint8) if mask.dtype == bool else mask
    labels = np.unique(mask)
    return mask, labels[labels != 0].tolist()


def _read_tiles(tiles, slide):
    """Return boxes of the tiles of one slide, their rows, and how many tiles there are in all."""
    table = getattr(tiles, "table", tiles)
    missing = [name for name in _COLUMNS if name not in table.columns]
    if missing:
        raise ValueError(f"The table of tiles has no column {some(missing)}.")
    of_tile = table["slide"].to_numpy()
    slides = getattr(tiles, "slide_ids", of_tile)
    if slide is None and len(set(of_tile)) > 1:
        raise ValueError(
            f"These are tiles of several slides, {some(dict.fromkeys(of_tile))}: give slide=, "
            "for a file of each."
        )
    if slide is not None and slide not in set(slides):
        raise ValueError(f"There is no slide {slide!r}, but {some(dict.fromkeys(slides))}.")
    rows = np.arange(len(table)) if slide is None else np.flatnonzero(of_tile == slide)
    top, left, height, width = table[_COLUMNS[1:]].to_numpy(np.float64)[rows].T
    return np.column_stack([left, top, left + width, top + height]), rows.tolist(), len(table)


def _read_names(names, labels, n):
    """Return the name and the colour, three bytes, of the class of each object."""
    known = ()
    if isinstance(names, str):
        found = [names] * n
    elif names is None:
        found = labels
    elif isinstance(names, Mapping):
        if labels is None:
            raise ValueError("Tiles have no labels that a mapping could name: give one name each.")
        missing = [label for label in dict.fromkeys(labels) if label not in names]
        if missing:
            raise ValueError(f"names has no entry for label {some(map(repr, missing))}.")
        found, known = [names[label] for label in labels], map(str, names.values())
    else:
        found = list(to_numpy(names))
        if len(found) != n:
            raise ValueError(f"names has {len(found)} entries for {n} objects: one each.")
    refuse_missing(found, "names", "entries", "name every object")
    found = [str(name) for name in found]
    colors = dict.fromkeys(known or sorted(set(found)))
    for number, name in enumerate(colors):
        colors[name] = bytes.fromhex(PALETTE[number % len(PALETTE)][1:])
    return [(name, colors[name]) for name in found]


def _columns(values):
    """Return measurements as a dict of columns."""
    if values is not None and not hasattr(values, "items"):
        raise ValueError(
            f"values must be a mapping of names to arrays, or a DataFrame, got "
            f"{type(values).__name__}."
        )
    return {} if values is None else {str(name): column for name, column in values.items()}


def _read_values(values, n):
    """Return a dict of the measurements of each object, without those that are not finite."""
    found = [{} for _ in range(n)]
    for name, column in _columns(values).items():
        try:
            column = np.asarray(to_numpy(column), np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"values[{name!r}] are no numbers: {error}.") from error
        if column.shape != (n,):
            raise ValueError(
                f"values[{name!r}] has shape {column.shape}, but there are {n} objects: one each."
            )
        for row in np.flatnonzero(np.isfinite(column)).tolist():
            found[row][name] = float(column[row])
    return found


# ---- output --------------------------------------------------------------------------------------


def _checked_path(path):
    if path is None:
        return None
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file in it, such as case1.geojson.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent} to write {path.name} to.")
    return path


def _write(path, text):
    """Write beside and rename, so that whatever fails leaves the file that was there."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("x", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
