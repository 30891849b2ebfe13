#version 450 core
// Fragment shader of the moor: shallow brown water over peat, with rain rings.
// Set 0 is per frame, set 1 per material. Everything is in metres, y up, linear light.

layout(location = 0) in vec3 vWorld;
layout(location = 1) in vec2 vUv;
layout(location = 0) out vec4 oColour;

layout(std140, set = 0, binding = 0) uniform Frame {
    mat4  viewProj;
    vec4  eye;            // w: time in seconds, wrapped at one hour
    vec4  sunDir;         // w: sun luminance
    vec4  skyTop;
    vec4  skyHorizon;
} frame;

layout(set = 0, binding = 1) uniform sampler2D uSceneColour;
layout(set = 0, binding = 2) uniform sampler2D uSceneDepth;   // reverse z

layout(std140, set = 1, binding = 0) uniform Bog {
    vec3  tannin;         // absorption per metre: red survives, blue does not
    float rain;           // 0 dry, 1 downpour
    float windSpeed;
    float nearPlane;
} bog;

const float RING_CELL = 0.35;
const float F0_WATER  = 0.02;

// PCG-style integer hash; sin-based ones show stripes on some phone GPUs.
uvec2 hash2(uvec2 v)
{
    v = v * 1664525u + 1013904223u;
    v.x += v.y * 1664525u;
    v.y += v.x * 1664525u;
    v ^= v >> 16u;
    v.x += v.y * 1664525u;
    v.y += v.x * 1664525u;
    return v ^ (v >> 16u);
}

vec2 rand2(ivec2 cell, int epoch)
{
    uvec2 h = hash2(uvec2(cell) ^ uvec2(uint(epoch) * 2654435761u, uint(epoch)));
    return vec2(h >> 8u) / 16777216.0;
}

// One drop per cell and epoch. The ring travels outwards at 25 cm/s and dies after 0.8 s.
vec2 ringSlope(vec2 p, float time)
{
    vec2  slope = vec2(0.0);
    ivec2 base  = ivec2(floor(p / RING_CELL));

    for (int j = -1; j <= 1; ++j)
    for (int i = -1; i <= 1; ++i) {
        ivec2 cell   = base + ivec2(i, j);
        float offset = rand2(cell, 0).x;
        float t      = time / 0.8 + offset;
        int   epoch  = int(floor(t));
        vec2  r      = rand2(cell, epoch);

        if (rand2(cell.yx, epoch).y > bog.rain) continue;

        vec2  d    = p - (vec2(cell) + r) * RING_CELL;
        float dist = length(d);
        float age  = fract(t) * 0.8;
        float x    = (dist - 0.25 * age) * 60.0;
        if (abs(x) > 9.0 || dist < 1e-4) continue;

        float fade = (1.0 - fract(t)) * exp(-0.12 * x * x);
        slope += d / dist * cos(x) * fade * 0.22;
    }
    return slope;
}

vec2 windSlope(vec2 p, float time)
{
    vec2 s = vec2(0.0);
    s += vec2(0.8, 0.6)   * cos(dot(p, vec2(0.8, 0.6)) * 5.1 - time * 2.7);
    s += vec2(0.6, -0.8)  * cos(dot(p, vec2(0.6, -0.8)) * 8.3 - time * 3.4) * 0.6;
    s += vec2(-0.28, 0.96) * cos(dot(p, vec2(-0.28, 0.96)) * 17.0 - time * 5.2) * 0.3;
    return s * 0.012 * min(bog.windSpeed, 8.0);
}

vec3 sky(vec3 d)
{
    float h = clamp(d.y, 0.0, 1.0);
    return mix(frame.skyHorizon.rgb, frame.skyTop.rgb, 1.0 - pow(1.0 - h, 3.0));
}

float linearDepth(float z) { return bog.nearPlane / max(z, 1e-6); }

void main()
{
    float time = frame.eye.w;
    vec3  v    = frame.eye.xyz - vWorld;
    float far  = length(v);
    v /= far;

    // Beyond 30 m a ring is smaller than a pixel and only makes the picture crawl.
    vec2 slope = windSlope(vWorld.xz, time);
    if (bog.rain > 0.0)
        slope += ringSlope(vWorld.xz, time) * smoothstep(30.0, 18.0, far);
    vec3 n = normalize(vec3(-slope.x, 1.0, -slope.y));

    ivec2 pixel   = ivec2(gl_FragCoord.xy);
    vec2  size    = vec2(textureSize(uSceneColour, 0));
    float surface = linearDepth(gl_FragCoord.z);
    float behind  = linearDepth(texelFetch(uSceneDepth, pixel, 0).r);
    vec2  bent    = (gl_FragCoord.xy + n.xz * 40.0 * clamp(behind - surface, 0.0, 1.0)) / size;

    // What we bent towards may stand in front of the water, a heron's leg for instance.
    float bentDepth = linearDepth(textureLod(uSceneDepth, bent, 0.0).r);
    if (bentDepth < surface) {
        bent = gl_FragCoord.xy / size;
        bentDepth = behind;
    }

    float path   = (bentDepth - surface) * (1.0 + 1.0 / max(v.y, 0.15));
    vec3  ground = textureLod(uSceneColour, bent, 0.0).rgb;
    vec3  murk   = vec3(0.050, 0.027, 0.009) * frame.sunDir.w;
    vec3  trans  = exp(-bog.tannin * path);
    vec3  body   = ground * trans + murk * (1.0 - trans);

    float nv      = clamp(dot(n, v), 0.0, 1.0);
    float fresnel = F0_WATER + (1.0 - F0_WATER) * pow(1.0 - nv, 5.0);
    vec3  mirror  = sky(reflect(-v, n));

    vec3  hv   = normalize(v + frame.sunDir.xyz);
    float spec = pow(max(dot(n, hv), 0.0), 700.0) * 90.0 * frame.sunDir.w;

    oColour = vec4(mix(body, mirror, fresnel) + spec * fresnel, 1.0);
}
