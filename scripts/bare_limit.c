/* The bare limit that bench_loader.py measures loaders against: libjpeg-turbo decodes the regions
 * that our loader decodes, and nothing else. Regions are widened for fancy upsampling as
 * loaders/_jpeg.c widens them; rows go to one small buffer and are thrown away. */
#include <stddef.h>
#include <stdio.h>

#include <jpeglib.h>

typedef struct {
    const unsigned char *data;
    unsigned long size;
    int left, top, right, bottom, denom;
} Item;

/* The neighbours that fancy upsampling needs on either side, as in loaders._jpeg. */
static unsigned find_margin(const struct jpeg_decompress_struct *jpeg)
{
    for (int i = 0; i < jpeg->num_components; i++)
        if (jpeg->comp_info[i].downsampled_width != jpeg->output_width)
            return jpeg->max_h_samp_factor;
    return 0;
}

/* Decode every item's region.  Errors end the process. */
void bare_decode(const Item *items, int count)
{
    for (const Item *item = items; item < items + count; item++) {
        struct jpeg_decompress_struct jpeg;
        struct jpeg_error_mgr errors;
        jpeg.err = jpeg_std_error(&errors);
        jpeg_create_decompress(&jpeg);
        jpeg_mem_src(&jpeg, item->data, item->size);
        jpeg_read_header(&jpeg, TRUE);
        jpeg.out_color_space = JCS_RGB;
        jpeg.scale_num = 1;
        jpeg.scale_denom = item->denom;
        jpeg_start_decompress(&jpeg);

        unsigned margin = find_margin(&jpeg);
        JDIMENSION left = (unsigned)item->left > margin ? item->left - margin : 0;
        JDIMENSION right = item->right + margin;
        if (right > jpeg.output_width)
            right = jpeg.output_width;
        JDIMENSION width = right - left;
        jpeg_crop_scanline(&jpeg, &left, &width);
        jpeg_skip_scanlines(&jpeg, item->top);
        JSAMPARRAY row = jpeg.mem->alloc_sarray((j_common_ptr)&jpeg, JPOOL_IMAGE, width * 3, 1);
        while (jpeg.output_scanline < (JDIMENSION)item->bottom)
            jpeg_read_scanlines(&jpeg, row, 1);
        jpeg_destroy_decompress(&jpeg);
    }
}
