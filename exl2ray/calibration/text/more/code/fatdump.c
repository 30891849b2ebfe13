/* fatdump: walk the allocation table of a FAT12/FAT16 floppy image and report what does not add up.
 * Read-only. Written to find out which of 140 school disks could still be saved.
 */
#include <ctype.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    uint16_t bytes_per_sector;
    uint8_t  sectors_per_cluster;
    uint16_t reserved;
    uint8_t  fats;
    uint16_t root_entries;
    uint32_t total_sectors;
    uint16_t sectors_per_fat;
    /* derived */
    uint32_t root_sector;
    uint32_t data_sector;
    uint32_t clusters;
    int      is16;
} Bpb;

typedef struct {
    const uint8_t *img;
    size_t         size;
    Bpb            b;
    uint16_t      *owner;      /* cluster -> number of the file that claimed it first, 0 = nobody */
    unsigned       nfiles;
    unsigned       problems;
} Disk;

static uint16_t le16(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }
static uint32_t le32(const uint8_t *p) { return le16(p) | (uint32_t)le16(p + 2) << 16; }

static int parse_bpb(Disk *d)
{
    const uint8_t *s = d->img;
    Bpb *b = &d->b;

    if (d->size < 512)
        return -1;
    b->bytes_per_sector = le16(s + 11);
    b->sectors_per_cluster = s[13];
    b->reserved = le16(s + 14);
    b->fats = s[16];
    b->root_entries = le16(s + 17);
    b->total_sectors = le16(s + 19);
    if (b->total_sectors == 0)
        b->total_sectors = le32(s + 32);
    b->sectors_per_fat = le16(s + 22);

    /* Some formatting programs of the eighties left the whole block at zero and relied on the media
       byte in the FAT. We only ever met the 720 K kind. */
    if (b->bytes_per_sector == 0 && d->size == 737280 && s[512] == 0xf9) {
        *b = (Bpb){ .bytes_per_sector = 512, .sectors_per_cluster = 2, .reserved = 1, .fats = 2,
                    .root_entries = 112, .total_sectors = 1440, .sectors_per_fat = 3 };
        puts("note: no parameter block, assuming 720 K");
    }
    if (b->bytes_per_sector != 512 || b->sectors_per_cluster == 0 || b->fats == 0)
        return -1;
    if ((size_t)b->total_sectors * 512 > d->size) {
        printf("warning: image is short, %zu of %u sectors\n", d->size / 512, b->total_sectors);
        d->problems++;
    }
    b->root_sector = b->reserved + (uint32_t)b->fats * b->sectors_per_fat;
    b->data_sector = b->root_sector + (b->root_entries * 32u + 511) / 512;
    if (b->data_sector >= b->total_sectors)
        return -1;
    b->clusters = (b->total_sectors - b->data_sector) / b->sectors_per_cluster;
    b->is16 = b->clusters >= 4085;
    return 0;
}

static const uint8_t *sector(const Disk *d, uint32_t n)
{
    static const uint8_t blank[512];

    return ((size_t)n + 1) * 512 <= d->size ? d->img + (size_t)n * 512 : blank;
}

/* Entry of copy k. Returned in FAT16 terms: 0 free, 0xfff7 bad, >= 0xfff8 end of chain. */
static uint16_t fat_entry(const Disk *d, int k, uint32_t cluster)
{
    size_t base = ((size_t)d->b.reserved + (size_t)k * d->b.sectors_per_fat) * 512;
    size_t at = base + (d->b.is16 ? cluster * 2 : cluster + cluster / 2);
    uint16_t v;

    if (at + 2 > d->size)
        return 0xfff7;
    v = le16(d->img + at);
    if (d->b.is16)
        return v;
    v = cluster & 1 ? v >> 4 : v & 0xfff;
    return v >= 0xff7 ? v | 0xf000 : v;
}

static void compare_fats(Disk *d)
{
    uint32_t c, differing = 0, first = 0;

    if (d->b.fats < 2)
        return;
    for (c = 2; c < d->b.clusters + 2; c++)
        if (fat_entry(d, 0, c) != fat_entry(d, 1, c) && differing++ == 0)
            first = c;
    if (differing) {
        printf("the two tables differ in %u entries, first at cluster %u\n", differing, first);
        d->problems++;
    }
}

/* Follows one chain, marks its clusters, returns how many there were. */
static uint32_t follow(Disk *d, const char *name, uint16_t start, uint16_t id)
{
    uint32_t n = 0;
    uint16_t c = start, next;

    while (c >= 2 && c < d->b.clusters + 2) {
        if (d->owner[c] == id) {
            printf("%s: chain loops back to cluster %u\n", name, c);
            d->problems++;
            return n;
        }
        if (d->owner[c] != 0) {
            printf("%s: cluster %u already belongs to file #%u\n", name, c, d->owner[c]);
            d->problems++;
            return n;
        }
        d->owner[c] = id;
        n++;
        next = fat_entry(d, 0, c);
        if (next >= 0xfff8)
            return n;
        if (next == 0xfff7 || next < 2) {
            printf("%s: chain breaks off after cluster %u (%s)\n", name, c, next ? "bad" : "free");
            d->problems++;
            return n;
        }
        c = next;
    }
    if (start != 0) {
        printf("%s: chain leaves the disk at cluster %u\n", name, c);
        d->problems++;
    }
    return n;
}

static void short_name(const uint8_t *e, char out[13])
{
    int i, o = 0;

    for (i = 0; i < 8 && e[i] != ' '; i++)
        out[o++] = (char)(i == 0 && e[0] == 0x05 ? 0xe5 : isprint(e[i]) ? e[i] : '?');
    if (e[8] != ' ')
        out[o++] = '.';
    for (i = 8; i < 11 && e[i] != ' '; i++)
        out[o++] = (char)(isprint(e[i]) ? e[i] : '?');
    out[o] = '\0';
}

static void walk_dir(Disk *d, uint16_t cluster, const char *path, int depth)
{
    uint32_t per_cluster = d->b.sectors_per_cluster * 16u;
    uint32_t i, limit = cluster ? UINT32_MAX : d->b.root_entries;

    for (i = 0; i < limit; i++) {
        uint32_t sec;
        const uint8_t *e;
        char name[13], full[256];
        uint32_t got, size;

        if (cluster == 0) {
            sec = d->b.root_sector + i / 16;
        } else {
            if (i != 0 && i % per_cluster == 0) {
                cluster = fat_entry(d, 0, cluster);
                if (cluster < 2 || cluster >= d->b.clusters + 2)
                    return;
            }
            sec = d->b.data_sector + (cluster - 2u) * d->b.sectors_per_cluster + i % per_cluster / 16;
        }
        e = sector(d, sec) + i % 16 * 32;
        if (e[0] == 0)
            return;
        if (e[0] == 0xe5 || e[0] == '.' || (e[11] & 0x08))
            continue;               /* deleted, self/parent, volume label or long-name piece */

        short_name(e, name);
        if (snprintf(full, sizeof full, "%s/%s", path, name) >= (int)sizeof full)
            continue;
        size = le32(e + 28);
        got = follow(d, full, le16(e + 26), (uint16_t)++d->nfiles);
        if (e[11] & 0x10) {
            if (depth < 16 && got > 0)
                walk_dir(d, le16(e + 26), full, depth + 1);
        } else {
            uint32_t bytes = d->b.sectors_per_cluster * 512u;
            uint32_t want = size / bytes + (size % bytes != 0);
            if (want != got) {
                printf("%s: %u bytes need %u clusters, chain has %u\n", full, size, want, got);
                d->problems++;
            }
        }
    }
}

static void lost_chains(Disk *d)
{
    uint32_t c, lost = 0;

    for (c = 2; c < d->b.clusters + 2; c++) {
        uint16_t v = fat_entry(d, 0, c);
        if (v != 0 && v != 0xfff7 && d->owner[c] == 0)
            lost++;
    }
    if (lost) {
        printf("%u clusters are allocated but belong to no file\n", lost);
        d->problems++;
    }
}

int main(int argc, char **argv)
{
    static uint8_t image[2880 * 512];
    Disk d = { .img = image };
    FILE *f;

    if (argc != 2 || (f = fopen(argv[1], "rb")) == NULL) {
        fprintf(stderr, "usage: fatdump IMAGE\n");
        return 2;
    }
    d.size = fread(image, 1, sizeof image, f);
    fclose(f);
    if (parse_bpb(&d) != 0) {
        printf("%s: not a FAT disk, or its boot sector is gone\n", argv[1]);
        return 2;
    }
    d.owner = calloc(d.b.clusters + 2, sizeof *d.owner);
    if (!d.owner)
        return 2;
    compare_fats(&d);
    walk_dir(&d, 0, "", 0);
    lost_chains(&d);
    printf("%u entries, %u problems\n", d.nfiles, d.problems);
    free(d.owner);
    return d.problems ? 1 : 0;
}
