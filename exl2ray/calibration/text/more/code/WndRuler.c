// WndRuler.c : an on-screen ruler, in pixels, millimetres or points.
// Drag to move, arrow keys to nudge, R to turn it upright, U to change the unit, Esc to quit.

#define WIN32_LEAN_AND_MEAN
#define UNICODE
#define _UNICODE
#include <windows.h>
#include <windowsx.h>
#include <strsafe.h>

#define IDT_TRACK       1
#define TRACK_INTERVAL  40          // ms; fast enough to feel live, slow enough not to show up in a trace
#define RULER_BREADTH   56
#define CCH_LABEL       16

typedef enum tagRULERUNIT { RU_PIXEL, RU_MILLIMETRE, RU_POINT, RU_COUNT } RULERUNIT;

typedef struct tagRULER {
    HWND        hWnd;
    HFONT       hFont;
    HBRUSH      hbrFace;
    RULERUNIT   unit;
    BOOL        fUpright;
    int         cxyLength;          // along the ruler, in device pixels
    int         nDpi;
    int         xyCursor;           // last cursor position along the ruler, -1 if outside
} RULER, *PRULER;

static const WCHAR g_szClass[] = L"WndRuler.Main";
static const LPCWSTR g_apszUnit[RU_COUNT] = { L"px", L"mm", L"pt" };

// Distance between minor ticks in 1/100 pixel, so that millimetres do not drift over a long ruler.
static int TickPitch(const RULER *pRuler)
{
    switch (pRuler->unit) {
    case RU_MILLIMETRE: return MulDiv(pRuler->nDpi, 1000, 254);
    case RU_POINT:      return MulDiv(pRuler->nDpi, 100, 72);
    default:            return 100;
    }
}

static void DrawTicks(HDC hdc, const RULER *pRuler)
{
    const int cPitch = TickPitch(pRuler);
    const int nSkip  = pRuler->unit == RU_MILLIMETRE ? 1 : 2;
    const int nMajor = pRuler->unit == RU_PIXEL ? 50 : 10;
    WCHAR szLabel[CCH_LABEL];
    int i;

    for (i = 0; ; i += nSkip) {
        int xy = MulDiv(i, cPitch, 100);
        int cTick = (i % nMajor == 0) ? 18 : (i % (nMajor / 2) == 0) ? 12 : 6;

        if (xy > pRuler->cxyLength)
            break;
        if (pRuler->fUpright) {
            MoveToEx(hdc, 0, xy, NULL);
            LineTo(hdc, cTick, xy);
        } else {
            MoveToEx(hdc, xy, 0, NULL);
            LineTo(hdc, xy, cTick);
        }
        if (i % nMajor == 0 && i != 0) {
            if (FAILED(StringCchPrintfW(szLabel, CCH_LABEL, L"%d", i)))
                continue;
            TextOutW(hdc, pRuler->fUpright ? 22 : xy - 8, pRuler->fUpright ? xy - 7 : 20,
                     szLabel, lstrlenW(szLabel));
        }
    }
}

static void OnPaint(PRULER pRuler)
{
    PAINTSTRUCT ps;
    RECT rc;
    HDC hdc = BeginPaint(pRuler->hWnd, &ps);
    HDC hdcMem = NULL;
    HBITMAP hbm = NULL, hbmOld = NULL;
    HFONT hfOld;

    if (hdc == NULL)
        return;
    GetClientRect(pRuler->hWnd, &rc);

    // Painted straight to the screen the labels flicker under the moving cursor line.
    hdcMem = CreateCompatibleDC(hdc);
    if (hdcMem == NULL)
        goto Exit;
    hbm = CreateCompatibleBitmap(hdc, rc.right, rc.bottom);
    if (hbm == NULL)
        goto Exit;
    hbmOld = SelectBitmap(hdcMem, hbm);
    hfOld = SelectFont(hdcMem, pRuler->hFont);

    FillRect(hdcMem, &rc, pRuler->hbrFace);
    SetBkMode(hdcMem, TRANSPARENT);
    DrawTicks(hdcMem, pRuler);
    TextOutW(hdcMem, 4, rc.bottom - 16, g_apszUnit[pRuler->unit], 2);

    if (pRuler->xyCursor >= 0) {
        HPEN hpenOld = SelectPen(hdcMem, GetStockObject(DC_PEN));
        SetDCPenColor(hdcMem, RGB(0xC0, 0x20, 0x20));
        MoveToEx(hdcMem, pRuler->fUpright ? 0 : pRuler->xyCursor, pRuler->fUpright ? pRuler->xyCursor : 0, NULL);
        LineTo(hdcMem, pRuler->fUpright ? rc.right : pRuler->xyCursor,
               pRuler->fUpright ? pRuler->xyCursor : rc.bottom);
        SelectPen(hdcMem, hpenOld);
    }
    BitBlt(hdc, 0, 0, rc.right, rc.bottom, hdcMem, 0, 0, SRCCOPY);
    SelectFont(hdcMem, hfOld);

Exit:
    if (hbmOld != NULL)
        SelectBitmap(hdcMem, hbmOld);
    if (hbm != NULL)
        DeleteObject(hbm);
    if (hdcMem != NULL)
        DeleteDC(hdcMem);
    EndPaint(pRuler->hWnd, &ps);
}

static void Turn(PRULER pRuler)
{
    pRuler->fUpright = !pRuler->fUpright;
    SetWindowPos(pRuler->hWnd, NULL, 0, 0,
                 pRuler->fUpright ? RULER_BREADTH : pRuler->cxyLength,
                 pRuler->fUpright ? pRuler->cxyLength : RULER_BREADTH,
                 SWP_NOMOVE | SWP_NOZORDER | SWP_NOACTIVATE);
    InvalidateRect(pRuler->hWnd, NULL, FALSE);
}

static LRESULT CALLBACK RulerWndProc(HWND hWnd, UINT uMsg, WPARAM wParam, LPARAM lParam)
{
    PRULER pRuler = (PRULER)GetWindowLongPtrW(hWnd, GWLP_USERDATA);
    POINT pt;
    RECT rc;

    switch (uMsg) {
    case WM_NCCREATE:
        pRuler = (PRULER)((LPCREATESTRUCTW)lParam)->lpCreateParams;
        pRuler->hWnd = hWnd;
        SetWindowLongPtrW(hWnd, GWLP_USERDATA, (LONG_PTR)pRuler);
        break;

    case WM_CREATE:
        return SetTimer(hWnd, IDT_TRACK, TRACK_INTERVAL, NULL) ? 0 : -1;

    case WM_NCHITTEST:
        return HTCAPTION;           // the whole face is a handle

    case WM_TIMER:
        GetCursorPos(&pt);
        ScreenToClient(hWnd, &pt);
        if (pRuler->fUpright)
            pt.x = pt.y;
        if (pt.x < 0 || pt.x > pRuler->cxyLength)
            pt.x = -1;
        if (pt.x != pRuler->xyCursor) {
            pRuler->xyCursor = pt.x;
            InvalidateRect(hWnd, NULL, FALSE);
        }
        return 0;

    case WM_KEYDOWN:
        GetWindowRect(hWnd, &rc);
        switch (wParam) {
        case VK_LEFT:   rc.left--;  break;
        case VK_RIGHT:  rc.left++;  break;
        case VK_UP:     rc.top--;   break;
        case VK_DOWN:   rc.top++;   break;
        case VK_ESCAPE: DestroyWindow(hWnd); return 0;
        case 'R':       Turn(pRuler); return 0;
        case 'U':
            pRuler->unit = (RULERUNIT)((pRuler->unit + 1) % RU_COUNT);
            InvalidateRect(hWnd, NULL, FALSE);
            return 0;
        default:
            return 0;
        }
        SetWindowPos(hWnd, NULL, rc.left, rc.top, 0, 0, SWP_NOSIZE | SWP_NOZORDER);
        return 0;

    case WM_DPICHANGED:
        // BUGBUG: the length should be rescaled too, but then "400 px" stops being 400 px.
        pRuler->nDpi = HIWORD(wParam);
        InvalidateRect(hWnd, NULL, FALSE);
        return 0;

    case WM_ERASEBKGND:
        return 1;

    case WM_PAINT:
        OnPaint(pRuler);
        return 0;

    case WM_DESTROY:
        KillTimer(hWnd, IDT_TRACK);
        PostQuitMessage(0);
        return 0;
    }
    return DefWindowProcW(hWnd, uMsg, wParam, lParam);
}
