/* loaders._jpeg: decode one region of a JPEG image with libjpeg-turbo, and resize it on the way out.
 *
 * Same pixels as Pillow.  A region equals, bit for bit, the crop of a full decode at the same scale (Pillow's draft(),
 * load(), crop() on the same libjpeg-turbo); a resized box equals Pillow's Image.resize(..., box=...) of that region.
 * Less work: blocks beside the region are entropy-decoded but not transformed, rows above it are skipped, rows below it are
 * never read.
 *
 * Broken files.  Nothing is made up: where Pillow's libjpeg would paint missing data grey, this module raises.
 *   CorruptError      the data end too early (a missing end marker included), or libjpeg reports damage, be it as an error
 *                     or as a warning: bad Huffman codes, a marker inside entropy-coded data, lost restart markers.
 *   UnsupportedError  not a JPEG, or one this module does not take: CMYK, YCCK, 12 bits, lossless, arithmetic coding where
 *                     the library lacks it.  The caller may give such a file to Pillow.
 *   LimitError        the image has more pixels, or the file more scans, than the caller allows.
 * Tolerated, as Pillow does, because the pixels are whole and real photographs have them: stray bytes in the header and
 * before the end marker, an unknown JFIF version or Adobe transform, odd but unused scan parameters.
 * Only what is decoded is checked: damage below the region stays unseen in a sequential file, and JPEG has no checksum, so
 * a flipped bit that still reads as valid codes gives wrong pixels.  Whole-file hashes are the cure, not this module.
 *
 * Threads.  Each call has its own decompressor on its own stack and holds no lock while it works.  Decompressors are not
 * kept for the next call: libjpeg would keep the Huffman and quantisation tables too, and decode a file that lacks its own
 * with those of the file before.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <jpeglib.h>
#include <jerror.h>

#include "_resample.h"

#if !defined(LIBJPEG_TURBO_VERSION_NUMBER) || LIBJPEG_TURBO_VERSION_NUMBER < 2000000
#error "loaders._jpeg needs libjpeg-turbo 2.0 or later, for jpeg_crop_scanline and jpeg_skip_scanlines"
#endif

/* A macro's value as a string. */
#define QUOTE_TEXT(text) #text
#define QUOTE(macro) QUOTE_TEXT(macro)

#define MAX_PIXELS 89478485 /* the size from which Pillow warns of a decompression bomb */
#define MAX_SCANS 100       /* encoders write some ten; each empty scan of a few bytes costs a pass over the whole image */

static PyObject *CorruptError, *UnsupportedError, *LimitError;

/* ---- One call ---- */

typedef struct {
    int left, top, right, bottom; /* right and bottom are exclusive */
} Region;

typedef struct {
    /* what is asked for */
    Py_buffer data;
    Region region;
    int denom;
    Py_ssize_t max_pixels;
    int max_scans;
    uint8_t *out;
    double x0, y0, x1, y1;
    int out_width, out_height;
    int flip;
    const Filter *filter;
    /* what works on it */
    Resizer resizer;
    struct jpeg_decompress_struct jpeg;
    struct jpeg_error_mgr errors;
    struct jpeg_source_mgr source;
    struct jpeg_progress_mgr progress;
    jmp_buf escape;
    /* how it failed; no exception: it did not */
    PyObject *exception;
    char message[JMSG_LENGTH_MAX];
} Job;

static void *allocate(Job *job, size_t size)
{
    /* libjpeg frees its pool with the decompressor, also after a longjmp. */
    return job->jpeg.mem->alloc_large((j_common_ptr)&job->jpeg, JPOOL_IMAGE, size);
}

_Noreturn static void fail(Job *job, PyObject *exception, const char *format, ...)
{
    va_list values;
    va_start(values, format);
    vsnprintf(job->message, sizeof job->message, format, values);
    va_end(values);
    job->exception = exception;
    longjmp(job->escape, 1);
}

/* ---- Callbacks of libjpeg ---- */

static void on_error(j_common_ptr jpeg)
{
    Job *job = jpeg->client_data;
    char reason[JMSG_LENGTH_MAX];
    jpeg->err->format_message(jpeg, reason);
    switch (jpeg->err->msg_code) {
    case JERR_NO_SOI:
    case JERR_SOF_UNSUPPORTED:
    case JERR_BAD_PRECISION:
    case JERR_COMPONENT_COUNT:
    case JERR_ARITH_NOTIMPL:
    case JERR_CCIR601_NOTIMPL:
    case JERR_CONVERSION_NOTIMPL:
    case JERR_FRACT_SAMPLE_NOTIMPL:
    case JERR_NOTIMPL:
        fail(job, UnsupportedError, "%s", reason);
    case JERR_OUT_OF_MEMORY:
        fail(job, PyExc_MemoryError, "%s", reason);
    default:
        fail(job, CorruptError, "%s", reason);
    }
}

static void on_message(j_common_ptr jpeg, int level)
{
    if (level >= 0) /* a trace, not a warning */
        return;
    switch (jpeg->err->msg_code) {
    case JWRN_ADOBE_XFORM:
    case JWRN_JFIF_MAJOR:
    case JWRN_NOT_SEQUENTIAL:
        return;
    case JWRN_EXTRANEOUS_DATA: {
        /* Harmless before the first scan and after the last; between, entropy-coded data were lost or damaged. */
        int marker = jpeg->err->msg_parm.i[1];
        if (marker == JPEG_EOI || ((j_decompress_ptr)jpeg)->input_scan_number == 0)
            return;
    }
    }
    on_error(jpeg);
}

static void on_progress(j_common_ptr jpeg)
{
    Job *job = jpeg->client_data;
    int scans = job->jpeg.input_scan_number;
    if (scans > job->max_scans)
        fail(job, LimitError, "the file has more than max_scans=%d scans", job->max_scans);
}

static void on_source_call(j_decompress_ptr Py_UNUSED(jpeg))
{
}

static boolean on_source_empty(j_decompress_ptr jpeg)
{
    /* The whole file is the first and only buffer.  libjpeg's own source would invent an end marker here. */
    ERREXIT(jpeg, JERR_INPUT_EOF);
    return FALSE;
}

static void on_source_skip(j_decompress_ptr jpeg, long count)
{
    if (count <= 0)
        return;
    if ((size_t)count > jpeg->src->bytes_in_buffer)
        ERREXIT(jpeg, JERR_INPUT_EOF);
    jpeg->src->next_input_byte += count;
    jpeg->src->bytes_in_buffer -= count;
}

/* Read the header, then do the work, if any.  Whatever fails inside ends here, and what was allocated is freed. */
static void run(Job *job, void (*work)(Job *))
{
    job->exception = NULL;
    job->jpeg.err = jpeg_std_error(&job->errors);
    job->errors.error_exit = on_error;
    job->errors.emit_message = on_message;
    job->jpeg.client_data = job;
    if (setjmp(job->escape) == 0) {
        jpeg_create_decompress(&job->jpeg);
        job->source = (struct jpeg_source_mgr){
            .next_input_byte = job->data.buf,
            .bytes_in_buffer = (size_t)job->data.len,
            .init_source = on_source_call,
            .fill_input_buffer = on_source_empty,
            .skip_input_data = on_source_skip,
            .resync_to_restart = jpeg_resync_to_restart,
            .term_source = on_source_call,
        };
        job->jpeg.src = &job->source;
        job->progress.progress_monitor = on_progress;
        job->jpeg.progress = &job->progress;
        jpeg_read_header(&job->jpeg, TRUE);
        if (work != NULL)
            work(job);
    }
    jpeg_destroy_decompress(&job->jpeg);
    resizer_free(&job->resizer);
}

/* ---- Decoding rows of a region ---- */

/* Check that the image is one we take and that the region lies inside it; leaves it ready for start_rows. */
static void open_image(Job *job)
{
    struct jpeg_decompress_struct *jpeg = &job->jpeg;
    const Region *region = &job->region;
    if ((int64_t)jpeg->image_width * jpeg->image_height > job->max_pixels)
        fail(job, LimitError, "the image has %ux%u pixels, more than max_pixels=%lld", jpeg->image_width, jpeg->image_height,
             (long long)job->max_pixels);
    if (jpeg->data_precision != 8)
        fail(job, UnsupportedError, "the image has %d bits a sample, not 8", jpeg->data_precision);
    if (jpeg->jpeg_color_space != JCS_GRAYSCALE && jpeg->jpeg_color_space != JCS_YCbCr && jpeg->jpeg_color_space != JCS_RGB)
        fail(job, UnsupportedError, "the image has %d components that are neither grey, YCbCr nor RGB", jpeg->num_components);
    jpeg->out_color_space = JCS_RGB;
    jpeg->scale_num = 1;
    jpeg->scale_denom = job->denom;
    jpeg_calc_output_dimensions(jpeg);
    if ((JDIMENSION)region->right > jpeg->output_width || (JDIMENSION)region->bottom > jpeg->output_height)
        fail(job, PyExc_ValueError, "region (%d, %d, %d, %d) is not inside the image of %ux%u at scale 1/%d", region->left,
             region->top, region->right, region->bottom, jpeg->output_width, jpeg->output_height, job->denom);
}

#if JPEG_LIB_VERSION >= 70
#define DCT_SIZE(component) ((component)->DCT_h_scaled_size)
#else
#define DCT_SIZE(component) ((component)->DCT_scaled_size)
#endif

/* Limit decoding to the region's columns, widened to where every pixel of the region is that of a full decode:
 *  - Fancy upsampling mixes a chroma sample with its neighbours, and treats the first and last column apart.  One chroma
 *    sample (at most max_h_samp_factor pixels) on either side is enough, and keeps two samples a row, without which
 *    jpeg_crop_scanline would switch to plain upsampling.
 *  - Smoothing, for progressive files whose last scans are missing, looks at two blocks on either side; it finds those on
 *    the right by itself but starts afresh at the left edge.
 * Returns the column of the region's first pixel in the rows that will be read. */
static JDIMENSION crop_columns(struct jpeg_decompress_struct *jpeg, const Region *region)
{
    int size = DCTSIZE / (int)jpeg->scale_denom;
    JDIMENSION before = jpeg->progressive_mode ? 2 * jpeg->max_h_samp_factor * size : 0, after = 0;
    for (const jpeg_component_info *c = jpeg->comp_info; c < jpeg->comp_info + jpeg->num_components; c++) {
        if (c->h_samp_factor * DCT_SIZE(c) == jpeg->max_h_samp_factor * size &&
            c->v_samp_factor * DCT_SIZE(c) == jpeg->max_v_samp_factor * size)
            continue; /* not upsampled */
        /* jpeg_crop_scanline takes a component's width from its sampling factor alone, which is wrong for upsampling where
         * the transform makes up for a part of the subsampling (2x4 at scale 1/2, say).  Rare: decode all columns. */
        if (DCT_SIZE(c) != size)
            return region->left;
        after = jpeg->max_h_samp_factor;
    }
    before += after;
    JDIMENSION left = (JDIMENSION)region->left > before ? region->left - before : 0;
    JDIMENSION right = region->right + after < jpeg->output_width ? region->right + after : jpeg->output_width;
    JDIMENSION width = right - left;
    jpeg_crop_scanline(jpeg, &left, &width);
    return region->left - left;
}

typedef struct {
    JSAMPROW row;          /* what libjpeg writes */
    const uint8_t *pixels; /* the region's first pixel in it */
} Rows;

/* Go to the region's first row.  slack: bytes that may be read beyond the region's last pixel. */
static Rows start_rows(Job *job, const Region *region, size_t slack)
{
    Rows rows;
    jpeg_start_decompress(&job->jpeg);
    JDIMENSION column = crop_columns(&job->jpeg, region);
    size_t size = (size_t)job->jpeg.output_width * CHANNELS;
    rows.row = allocate(job, size + slack);
    memset(rows.row + size, 0, slack);
    rows.pixels = rows.row + column * CHANNELS;
    jpeg_skip_scanlines(&job->jpeg, region->top);
    return rows;
}

static void read_row(Job *job, Rows *rows)
{
    jpeg_read_scanlines(&job->jpeg, &rows->row, 1);
}

static void decode_region_work(Job *job)
{
    const Region *region = &job->region;
    size_t row_size = (size_t)(region->right - region->left) * CHANNELS;
    open_image(job);
    Rows rows = start_rows(job, region, 0);
    for (int y = 0; y < region->bottom - region->top; y++) {
        read_row(job, &rows);
        memcpy(job->out + y * row_size, rows.pixels, row_size);
    }
}

/* Each row is resampled as soon as it is decoded; rows and columns that the box does not need are not decoded. */
static void decode_resized_work(Job *job)
{
    const Region *region = &job->region;
    const Axis *across = &job->resizer.across, *down = &job->resizer.down;
    /* Pillow takes the box as floats, relative to the image it resizes. */
    const float box[4] = {(float)(job->x0 - region->left), (float)(job->y0 - region->top), (float)(job->x1 - region->left),
                          (float)(job->y1 - region->top)};
    open_image(job);
    if (resizer_init(&job->resizer, job->filter, region->right - region->left, region->bottom - region->top, box,
                     job->out_width, job->out_height, job->flip) < 0)
        fail(job, PyExc_MemoryError, "no memory to resize to %dx%d", job->out_width, job->out_height);
    const Region needed = {region->left + across->begin, region->top + down->begin, region->left + across->end,
                           region->top + down->end};
    Rows rows = start_rows(job, &needed, resizer_slack(&job->resizer));
    for (int y = needed.top; y < needed.bottom; y++) {
        read_row(job, &rows);
        resizer_push(&job->resizer, rows.pixels, job->out);
    }
}

/* ---- The module ---- */

/* Raise ValueError; for checks that need the GIL.  Python's own formats know no %g. */
static int refuse(const char *format, ...)
{
    char message[256];
    va_list values;
    va_start(values, format);
    vsnprintf(message, sizeof message, format, values);
    va_end(values);
    PyErr_SetString(PyExc_ValueError, message);
    return -1;
}

static int check_region(const Job *job)
{
    const Region *region = &job->region;
    if (job->denom != 1 && job->denom != 2 && job->denom != 4 && job->denom != 8)
        return refuse("denom must be 1, 2, 4 or 8 but got %d", job->denom);
    if (region->left < 0 || region->top < 0 || region->left >= region->right || region->top >= region->bottom)
        return refuse("region must not be empty or negative but got (%d, %d, %d, %d)", region->left, region->top,
                      region->right, region->bottom);
    return 0;
}

static int check_box(const Job *job)
{
    const Region *region = &job->region;
    /* Written so that NaN fails. */
    if (region->left <= job->x0 && job->x0 < job->x1 && job->x1 <= region->right && region->top <= job->y0 &&
        job->y0 < job->y1 && job->y1 <= region->bottom)
        return 0;
    return refuse("box must not be empty, and lie inside the region (%d, %d, %d, %d), but got (%g, %g, %g, %g)", region->left,
                  region->top, region->right, region->bottom, job->x0, job->y0, job->x1, job->y1);
}

static int set_output(Job *job, const Py_buffer *out)
{
    if (out->ndim != 3 || out->itemsize != 1 || out->shape[2] != CHANNELS)
        return refuse("out must be uint8 of shape (height, width, 3) but has %d dimensions of %d-byte items", out->ndim,
                      (int)out->itemsize);
    for (int i = 0; i < 2; i++)
        if (out->shape[i] < 1 || out->shape[i] > JPEG_MAX_DIMENSION)
            return refuse("out must be 1 to %ld pixels high and wide but has %lld", JPEG_MAX_DIMENSION,
                          (long long)out->shape[i]);
    job->out = out->buf;
    job->out_height = (int)out->shape[0];
    job->out_width = (int)out->shape[1];
    return 0;
}

static int set_filter(Job *job, const char *name)
{
    for (size_t i = 0; i < sizeof FILTERS / sizeof *FILTERS; i++)
        if (strcmp(name, FILTERS[i].name) == 0) {
            job->filter = &FILTERS[i];
            return 0;
        }
    return refuse("filter must be 'bilinear' or 'bicubic' but got '%.50s'", name);
}

/* Do the work without the GIL; 0, or -1 with a Python exception set. */
static int run_unlocked(Job *job, void (*work)(Job *))
{
    Py_BEGIN_ALLOW_THREADS
    run(job, work);
    Py_END_ALLOW_THREADS
    if (job->exception == NULL)
        return 0;
    PyErr_SetString(job->exception, job->message);
    return -1;
}

PyDoc_STRVAR(read_header_doc,
"read_header(data, /)\n--\n\n"
"Return (width, height, components, progressive) of a JPEG file; nothing is decoded.\n\n"
"Raises CorruptError or UnsupportedError.");

static PyObject *read_header(PyObject *Py_UNUSED(module), PyObject *data)
{
    Job job = {0};
    if (PyObject_GetBuffer(data, &job.data, PyBUF_SIMPLE) < 0)
        return NULL;
    int failed = run_unlocked(&job, NULL);
    PyBuffer_Release(&job.data);
    if (failed)
        return NULL;
    return Py_BuildValue("IIiO", job.jpeg.image_width, job.jpeg.image_height, job.jpeg.num_components,
                         job.jpeg.progressive_mode ? Py_True : Py_False);
}

PyDoc_STRVAR(decode_region_doc,
"decode_region(data, left, top, right, bottom, denom, *,\n"
"              max_pixels=" QUOTE(MAX_PIXELS) ", max_scans=" QUOTE(MAX_SCANS) ")\n--\n\n"
"Return the region [left, right) x [top, bottom) of a JPEG file, bytes of packed RGB rows.\n\n"
"The region is in pixels of the image at scale 1/denom (1, 2, 4 or 8), which is ceil(width / denom) by\n"
"ceil(height / denom) large. Raises CorruptError, UnsupportedError, LimitError, or ValueError for a bad region.");

static PyObject *decode_region(PyObject *Py_UNUSED(module), PyObject *args, PyObject *keywords)
{
    static char *names[] = {"data", "left", "top", "right", "bottom", "denom", "max_pixels", "max_scans", NULL};
    Job job = {.max_pixels = MAX_PIXELS, .max_scans = MAX_SCANS};
    Region *region = &job.region;
    PyObject *result = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "y*iiiii|$ni:decode_region", names, &job.data, &region->left,
                                     &region->top, &region->right, &region->bottom, &job.denom, &job.max_pixels,
                                     &job.max_scans))
        return NULL;
    if (check_region(&job) < 0)
        goto done;
    int64_t pixels = (int64_t)(region->right - region->left) * (region->bottom - region->top);
    if (pixels > job.max_pixels) {
        PyErr_Format(LimitError, "the region has %lld pixels, more than max_pixels=%zd", (long long)pixels, job.max_pixels);
        goto done;
    }
    result = PyBytes_FromStringAndSize(NULL, pixels * CHANNELS);
    if (result == NULL)
        goto done;
    job.out = (uint8_t *)PyBytes_AS_STRING(result);
    if (run_unlocked(&job, decode_region_work) < 0)
        Py_CLEAR(result);
done:
    PyBuffer_Release(&job.data);
    return result;
}

PyDoc_STRVAR(decode_resized_doc,
"decode_resized(data, x0, y0, x1, y1, left, top, right, bottom, denom, out, flip=False, *, filter='bilinear',\n"
"               max_pixels=" QUOTE(MAX_PIXELS) ", max_scans=" QUOTE(MAX_SCANS) ")\n--\n\n"
"Decode a region like decode_region and resize the box x0..x1, y0..y1 of it into out.\n\n"
"The box lies inside the region, in the same coordinates; pixels beyond the region have no influence.\n"
"out is a writable C-contiguous buffer of uint8 of shape (height, width, 3); flip mirrors it left-right; filter is\n"
"'bilinear' or 'bicubic', both antialiased. After an error, out holds anything. Raises what decode_region raises.");

static PyObject *decode_resized(PyObject *Py_UNUSED(module), PyObject *args, PyObject *keywords)
{
    static char *names[] = {"data", "x0", "y0", "x1", "y1", "left", "top", "right", "bottom", "denom", "out", "flip",
                            "filter", "max_pixels", "max_scans", NULL};
    Job job = {.max_pixels = MAX_PIXELS, .max_scans = MAX_SCANS};
    Region *region = &job.region;
    Py_buffer out = {0};
    PyObject *out_object;
    const char *filter = "bilinear";
    int failed = -1;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "y*ddddiiiiiO|p$sni:decode_resized", names, &job.data, &job.x0, &job.y0,
                                     &job.x1, &job.y1, &region->left, &region->top, &region->right, &region->bottom,
                                     &job.denom, &out_object, &job.flip, &filter, &job.max_pixels, &job.max_scans))
        return NULL;
    if (PyObject_GetBuffer(out_object, &out, PyBUF_ND | PyBUF_WRITABLE) == 0 && check_region(&job) == 0 &&
        check_box(&job) == 0 && set_output(&job, &out) == 0 && set_filter(&job, filter) == 0)
        failed = run_unlocked(&job, decode_resized_work);
    PyBuffer_Release(&out);
    PyBuffer_Release(&job.data);
    if (failed)
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"read_header", read_header, METH_O, read_header_doc},
    {"decode_region", (PyCFunction)(void (*)(void))decode_region, METH_VARARGS | METH_KEYWORDS, decode_region_doc},
    {"decode_resized", (PyCFunction)(void (*)(void))decode_resized, METH_VARARGS | METH_KEYWORDS, decode_resized_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "loaders._jpeg",
    .m_doc = "Decode a region of a JPEG image with libjpeg-turbo, and resize it; same pixels as Pillow.",
    .m_size = -1,
    .m_methods = methods,
};

static PyObject *add_error(PyObject *module, const char *name, const char *full_name, const char *doc)
{
    PyObject *error = PyErr_NewExceptionWithDoc(full_name, doc, PyExc_ValueError, NULL);
    if (error != NULL && PyModule_AddObjectRef(module, name, error) < 0)
        Py_CLEAR(error);
    return error;
}

PyMODINIT_FUNC PyInit__jpeg(void)
{
    PyObject *module = PyModule_Create(&definition);
    if (module == NULL)
        return NULL;
    CorruptError = add_error(module, "CorruptError", "loaders._jpeg.CorruptError",
                             "Raised when a JPEG file is truncated or damaged.");
    UnsupportedError = add_error(module, "UnsupportedError", "loaders._jpeg.UnsupportedError",
                                 "Raised when a file is not a JPEG, or of a kind this module does not decode.");
    LimitError = add_error(module, "LimitError", "loaders._jpeg.LimitError",
                           "Raised when an image has more pixels or scans than allowed.");
    if (CorruptError == NULL || UnsupportedError == NULL || LimitError == NULL ||
        PyModule_AddStringConstant(module, "LIBJPEG_TURBO_VERSION", QUOTE(LIBJPEG_TURBO_VERSION)) < 0)
        Py_CLEAR(module);
    return module;
}
