// PrefsDlg.cpp : the Preferences property sheet
//

#include "stdafx.h"
#include "Gazetteer.h"
#include "PrefsDlg.h"
#include "resource.h"

#include <commctrl.h>
#include <prsht.h>
#include <shlobj.h>
#include <strsafe.h>

#define MAX_RECENT      16
#define WMU_REFRESH     (WM_APP + 3)

static const TCHAR g_szKey[] = TEXT("Software\\Fernhill\\Gazetteer\\Preferences");

typedef struct tagPREFS
{
    DWORD cbSize;
    BOOL  bMetric;
    DWORD dwGridStep;           // seconds of arc
    DWORD dwRecent;
    TCHAR szTileDir[MAX_PATH];
    LOGFONT lfLabel;
} PREFS;

static PREFS g_prefs;
static PREFS g_edit;            // what the sheet works on until Apply

struct GRIDSTEP
{
    UINT  idString;
    DWORD dwSeconds;
};

static const GRIDSTEP c_steps[] =
{
    { IDS_GRID_10DEG,  36000 },
    { IDS_GRID_5DEG,   18000 },
    { IDS_GRID_1DEG,    3600 },
    { IDS_GRID_30MIN,   1800 },
    { IDS_GRID_10MIN,    600 },
    { IDS_GRID_1MIN,      60 },
};

BOOL LoadPrefs(void)
{
    HKEY hKey;
    DWORD cb, dwType;
    PREFS tmp;

    ZeroMemory(&g_prefs, sizeof(g_prefs));
    g_prefs.cbSize = sizeof(g_prefs);
    g_prefs.bMetric = TRUE;
    g_prefs.dwGridStep = 3600;
    g_prefs.dwRecent = 8;
    SystemParametersInfo(SPI_GETICONTITLELOGFONT, sizeof(LOGFONT), &g_prefs.lfLabel, 0);

    if (RegOpenKeyEx(HKEY_CURRENT_USER, g_szKey, 0, KEY_READ, &hKey) != ERROR_SUCCESS)
        return FALSE;

    cb = sizeof(tmp);
    if (RegQueryValueEx(hKey, TEXT("Blob"), NULL, &dwType, (LPBYTE)&tmp, &cb) == ERROR_SUCCESS &&
        dwType == REG_BINARY && cb == sizeof(tmp) && tmp.cbSize == sizeof(tmp))
    {
        tmp.szTileDir[MAX_PATH - 1] = 0;
        tmp.dwRecent = min(tmp.dwRecent, MAX_RECENT);
        g_prefs = tmp;
    }

    RegCloseKey(hKey);
    return TRUE;
}

static HRESULT SavePrefs(void)
{
    HKEY hKey = NULL;
    LONG lRes;

    lRes = RegCreateKeyEx(HKEY_CURRENT_USER, g_szKey, 0, NULL, REG_OPTION_NON_VOLATILE,
                          KEY_WRITE, NULL, &hKey, NULL);
    if (lRes == ERROR_SUCCESS)
    {
        lRes = RegSetValueEx(hKey, TEXT("Blob"), 0, REG_BINARY, (const BYTE *)&g_prefs, sizeof(g_prefs));
        RegCloseKey(hKey);
    }
    return HRESULT_FROM_WIN32(lRes);
}

static int CALLBACK BrowseCallback(HWND hwnd, UINT uMsg, LPARAM lParam, LPARAM lpData)
{
    if (uMsg == BFFM_INITIALIZED && lpData)
        SendMessage(hwnd, BFFM_SETSELECTION, TRUE, lpData);
    return 0;
}

static void OnBrowse(HWND hDlg)
{
    BROWSEINFO bi = { 0 };
    TCHAR szTitle[128];
    TCHAR szPath[MAX_PATH];
    LPITEMIDLIST pidl;

    GetDlgItemText(hDlg, IDC_TILEDIR, szPath, ARRAYSIZE(szPath));
    LoadString(g_hInst, IDS_PICK_TILES, szTitle, ARRAYSIZE(szTitle));

    bi.hwndOwner = hDlg;
    bi.lpszTitle = szTitle;
    bi.ulFlags = BIF_RETURNONLYFSDIRS | BIF_NEWDIALOGSTYLE;
    bi.lpfn = BrowseCallback;
    bi.lParam = (LPARAM)szPath;

    pidl = SHBrowseForFolder(&bi);
    if (!pidl)
        return;

    if (SHGetPathFromIDList(pidl, szPath))
    {
        SetDlgItemText(hDlg, IDC_TILEDIR, szPath);
        PropSheet_Changed(GetParent(hDlg), hDlg);
    }
    CoTaskMemFree(pidl);
}

static INT_PTR CALLBACK GeneralPageProc(HWND hDlg, UINT uMsg, WPARAM wParam, LPARAM lParam)
{
    HWND hCombo;
    TCHAR sz[64];
    int i, iSel;

    switch (uMsg)
    {
    case WM_INITDIALOG:
        CheckRadioButton(hDlg, IDC_METRIC, IDC_NAUTICAL, g_edit.bMetric ? IDC_METRIC : IDC_NAUTICAL);

        hCombo = GetDlgItem(hDlg, IDC_GRIDSTEP);
        for (i = 0; i < ARRAYSIZE(c_steps); i++)
        {
            LoadString(g_hInst, c_steps[i].idString, sz, ARRAYSIZE(sz));
            ComboBox_AddString(hCombo, sz);
            ComboBox_SetItemData(hCombo, i, c_steps[i].dwSeconds);
            if (c_steps[i].dwSeconds == g_edit.dwGridStep)
                ComboBox_SetCurSel(hCombo, i);
        }

        Edit_LimitText(GetDlgItem(hDlg, IDC_TILEDIR), MAX_PATH - 1);
        SetDlgItemText(hDlg, IDC_TILEDIR, g_edit.szTileDir);
        SendDlgItemMessage(hDlg, IDC_RECENTSPIN, UDM_SETRANGE, 0, MAKELPARAM(MAX_RECENT, 0));
        SetDlgItemInt(hDlg, IDC_RECENT, g_edit.dwRecent, FALSE);
        SHAutoComplete(GetDlgItem(hDlg, IDC_TILEDIR), SHACF_FILESYSTEM);
        return TRUE;

    case WM_COMMAND:
        switch (LOWORD(wParam))
        {
        case IDC_BROWSE:
            OnBrowse(hDlg);
            break;
        case IDC_METRIC:
        case IDC_NAUTICAL:
            PropSheet_Changed(GetParent(hDlg), hDlg);
            break;
        case IDC_TILEDIR:
        case IDC_RECENT:
            // Also sent while WM_INITDIALOG fills in the fields
            if (HIWORD(wParam) == EN_CHANGE && GetFocus() == (HWND)lParam)
                PropSheet_Changed(GetParent(hDlg), hDlg);
            break;
        case IDC_GRIDSTEP:
            if (HIWORD(wParam) == CBN_SELCHANGE)
                PropSheet_Changed(GetParent(hDlg), hDlg);
            break;
        }
        break;

    case WM_NOTIFY:
        switch (((LPNMHDR)lParam)->code)
        {
        case PSN_KILLACTIVE:
        {
            BOOL bOk;
            UINT n = GetDlgItemInt(hDlg, IDC_RECENT, &bOk, FALSE);
            if (!bOk || n > MAX_RECENT)
            {
                ShowErrorBalloon(GetDlgItem(hDlg, IDC_RECENT), IDS_BAD_RECENT);
                SetWindowLongPtr(hDlg, DWLP_MSGRESULT, TRUE);
                return TRUE;
            }
            g_edit.dwRecent = n;
            return TRUE;
        }
        case PSN_APPLY:
            g_edit.bMetric = IsDlgButtonChecked(hDlg, IDC_METRIC) == BST_CHECKED;
            hCombo = GetDlgItem(hDlg, IDC_GRIDSTEP);
            iSel = ComboBox_GetCurSel(hCombo);
            if (iSel != CB_ERR)
                g_edit.dwGridStep = (DWORD)ComboBox_GetItemData(hCombo, iSel);
            GetDlgItemText(hDlg, IDC_TILEDIR, g_edit.szTileDir, ARRAYSIZE(g_edit.szTileDir));

            g_prefs = g_edit;
            if (FAILED(SavePrefs()))
                MessageBeep(MB_ICONEXCLAMATION);
            PostMessage(g_hwndMain, WMU_REFRESH, 0, 0);
            SetWindowLongPtr(hDlg, DWLP_MSGRESULT, PSNRET_NOERROR);
            return TRUE;
        }
        break;
    }
    return FALSE;
}

INT_PTR ShowPreferences(HWND hwndOwner)
{
    PROPSHEETPAGE psp = { sizeof(psp) };
    PROPSHEETHEADER psh = { sizeof(psh) };

    g_edit = g_prefs;

    psp.dwFlags = PSP_DEFAULT;
    psp.hInstance = g_hInst;
    psp.pszTemplate = MAKEINTRESOURCE(IDD_PREFS_GENERAL);
    psp.pfnDlgProc = GeneralPageProc;

    psh.dwFlags = PSH_PROPSHEETPAGE | PSH_NOCONTEXTHELP;
    psh.hwndParent = hwndOwner;
    psh.hInstance = g_hInst;
    psh.pszCaption = MAKEINTRESOURCE(IDS_PREFS_TITLE);
    psh.nPages = 1;
    psh.ppsp = &psp;

    return PropertySheet(&psh);
}
