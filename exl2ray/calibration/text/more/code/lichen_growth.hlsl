// Reaction-diffusion on a texture: patches of crust that grow over stone in the background of the title screen.
// Two chemicals, U (food) and V (crust), Gray-Scott. Feed rate depends on the moisture map, so growth follows
// cracks and stops at dry edges. Eight iterations per frame on a 1024 square take 0.6 ms on the old laptop.

#define GROUP   16
#define BORDER  2
#define STEPS   2               // iterations per dispatch, bought with a border of the same width
#define TILE    (GROUP + 2 * BORDER)

cbuffer Params : register(b0)
{
    uint2  gSize;
    float  gDt;
    float  gDiffU;
    float  gDiffV;
    float  gFeedDry;
    float  gFeedWet;
    float  gKill;
    uint   gFrame;
    float3 gPadding;
};

Texture2D<float2>   gIn       : register(t0);
Texture2D<float>    gMoisture : register(t1);
Texture2D<float>    gHeight   : register(t2);
RWTexture2D<float2> gOut      : register(u0);
RWStructuredBuffer<uint> gCover : register(u1);   // [0]: pixels that carry crust, for the achievement

groupshared float2 sA[TILE][TILE];
groupshared float2 sB[TILE][TILE];
groupshared uint   sCount;

uint wang(uint s)
{
    s = (s ^ 61u) ^ (s >> 16);
    s *= 9u;
    s ^= s >> 4;
    s *= 0x27d4eb2du;
    return s ^ (s >> 15);
}

int2 wrap(int2 p)
{
    return (p + int2(gSize)) % int2(gSize);
}

// Nine-point Laplacian. Weights sum to zero; the diagonal ones keep spots round instead of square.
float2 laplacian(float2 c, float2 n, float2 s, float2 w, float2 e, float2 nw, float2 ne, float2 sw, float2 se)
{
    return 0.20 * (n + s + w + e) + 0.05 * (nw + ne + sw + se) - c;
}

float2 react(float2 uv, float2 lap, float feed)
{
    float uvv = uv.x * uv.y * uv.y;
    float2 d;
    d.x = gDiffU * lap.x - uvv + feed * (1.0 - uv.x);
    d.y = gDiffV * lap.y + uvv - (feed + gKill) * uv.y;
    return saturate(uv + d * gDt);
}

[numthreads(GROUP, GROUP, 1)]
void Grow(uint3 id : SV_DispatchThreadID, uint3 gid : SV_GroupID, uint3 tid : SV_GroupThreadID, uint flat : SV_GroupIndex)
{
    int2 origin = int2(gid.xy) * GROUP - BORDER;

    // 256 threads fill 400 cells.
    [unroll]
    for (uint k = 0; k < 2; ++k) {
        uint i = flat + k * GROUP * GROUP;
        if (i < TILE * TILE) {
            uint2 c = uint2(i % TILE, i / TILE);
            sA[c.y][c.x] = gIn[wrap(origin + int2(c))];
        }
    }
    if (flat == 0)
        sCount = 0;
    GroupMemoryBarrierWithGroupSync();

    [unroll]
    for (uint s = 1; s <= STEPS; ++s) {
        uint side = TILE - 2 * s;           // the valid region shrinks by one on each side
        for (uint i = flat; i < side * side; i += GROUP * GROUP) {
            uint x = i % side + s, y = i / side + s;
            float2 l, c;
            if (s & 1) {
                c = sA[y][x];
                l = laplacian(c, sA[y-1][x], sA[y+1][x], sA[y][x-1], sA[y][x+1],
                              sA[y-1][x-1], sA[y-1][x+1], sA[y+1][x-1], sA[y+1][x+1]);
            } else {
                c = sB[y][x];
                l = laplacian(c, sB[y-1][x], sB[y+1][x], sB[y][x-1], sB[y][x+1],
                              sB[y-1][x-1], sB[y-1][x+1], sB[y+1][x-1], sB[y+1][x+1]);
            }
            float wet  = gMoisture[wrap(origin + int2(x, y))];
            float2 r   = react(c, l, lerp(gFeedDry, gFeedWet, wet));
            if (s & 1) sB[y][x] = r; else sA[y][x] = r;
        }
        GroupMemoryBarrierWithGroupSync();
    }

    float2 uv = sA[tid.y + BORDER][tid.x + BORDER];

    // A spore lands: about one in four million pixels and frames, on damp stone only.
    uint rnd = wang(id.x + id.y * gSize.x + gFrame * 0x9e3779b9u);
    if (rnd < 1024u && gMoisture[id.xy] > 0.6)
        uv.y = 0.9;

    if (all(id.xy < gSize)) {
        gOut[id.xy] = uv;
        if (uv.y > 0.15)
            InterlockedAdd(sCount, 1u);
    }
    GroupMemoryBarrierWithGroupSync();
    if (flat == 0 && sCount > 0)
        InterlockedAdd(gCover[0], sCount);
}

// ---------------------------------------------------------------------------------------------------------

SamplerState gLinear : register(s0);
Texture2D<float2> gState : register(t3);
Texture2D<float4> gStone : register(t4);

struct V2P
{
    float4 pos : SV_Position;
    float2 uv  : TEXCOORD0;
};

// One triangle that covers the screen, made from the vertex number alone.
V2P FullScreen(uint v : SV_VertexID)
{
    V2P o;
    o.uv  = float2((v << 1) & 2, v & 2);
    o.pos = float4(o.uv * float2(2, -2) + float2(-1, 1), 0, 1);
    return o;
}

float4 Shade(V2P i) : SV_Target
{
    float2 texel = 1.0 / float2(gSize);
    float v  = gState.SampleLevel(gLinear, i.uv, 0).y;
    float vx = gState.SampleLevel(gLinear, i.uv + float2(texel.x, 0), 0).y;
    float vy = gState.SampleLevel(gLinear, i.uv + float2(0, texel.y), 0).y;

    float crust = smoothstep(0.12, 0.28, v);
    float rim   = crust * (1 - smoothstep(0.28, 0.36, v));

    float h  = gHeight.SampleLevel(gLinear, i.uv, 0);
    float hx = gHeight.SampleLevel(gLinear, i.uv + float2(texel.x, 0), 0);
    float hy = gHeight.SampleLevel(gLinear, i.uv + float2(0, texel.y), 0);
    float3 n = normalize(float3((h - hx) * 6 + (v - vx) * 9, (h - hy) * 6 + (v - vy) * 9, 1));
    float lit = 0.35 + 0.65 * saturate(dot(n, normalize(float3(-0.5, -0.6, 0.7))));

    float3 stone  = gStone.Sample(gLinear, i.uv).rgb;
    float3 yellow = lerp(float3(0.78, 0.61, 0.10), float3(0.52, 0.58, 0.38), saturate(h * 1.4 - 0.2));
    float3 colour = lerp(stone, yellow, crust) + rim * 0.18;
    return float4(colour * lit, 1);
}
