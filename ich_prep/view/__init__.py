"""The viewer: a page in the browser that shows a dataset, served from this machine or written as files.

data           a dataset as the page needs it: volumes, slices, pixels, quarantine
command        what `ich-prep view` does
pictures       quarantined files that can be decoded, as pictures
guard          who may ask
assets         the files of the page
server         the page and its data over HTTP, to this machine only
pages          the page and its data as files
static/        the page itself
"""
