unit uLabelSheet;

{ Places jam-jar labels on sheets of sticky paper. A sheet that was started last week has holes
  where labels were already peeled off, so every sheet carries a mask of used positions. }

{$mode objfpc}{$H+}

interface

uses
  Classes, SysUtils;

type
  ELabelSheet = class(Exception);

  TMillimetres = type Double;

  TSheetFormat = record
    Name: string;
    Columns, Rows: Integer;
    LabelWidth, LabelHeight: TMillimetres;
    LeftMargin, TopMargin: TMillimetres;
    PitchX, PitchY: TMillimetres;      { distance between the left (top) edges of neighbours }
  end;

  TPlacement = record
    SheetNo: Integer;                  { 0 is the sheet already in the tray }
    X, Y: TMillimetres;
    JobIndex: Integer;
  end;

  TPlacementEvent = procedure(Sender: TObject; const P: TPlacement) of object;

  { TLabelLayout }

  TLabelLayout = class
  private
    FFormat: TSheetFormat;
    FUsed: TBits;
    FSheet: Integer;
    FNext: Integer;
    FOnPlace: TPlacementEvent;
    function GetCapacity: Integer;
    procedure NewSheet;
    procedure CheckFormat;
  public
    constructor Create(const AFormat: TSheetFormat);
    destructor Destroy; override;
    procedure LoadMask(const Mask: string);
    function SaveMask: string;
    procedure PlaceJob(AJobIndex, Copies: Integer);
    property Capacity: Integer read GetCapacity;
    property SheetsTouched: Integer read FSheet;
    property OnPlace: TPlacementEvent read FOnPlace write FOnPlace;
  end;

const
  sfRoundLid: TSheetFormat = (
    Name: 'Round lid 48 mm'; Columns: 4; Rows: 5;
    LabelWidth: 48.0; LabelHeight: 48.0;
    LeftMargin: 6.0; TopMargin: 14.5;
    PitchX: 50.0; PitchY: 54.0);

implementation

const
  PageWidth = 210.0;
  PageHeight = 297.0;

constructor TLabelLayout.Create(const AFormat: TSheetFormat);
begin
  inherited Create;
  FFormat := AFormat;
  CheckFormat;
  FUsed := TBits.Create(Capacity);
end;

destructor TLabelLayout.Destroy;
begin
  FUsed.Free;
  inherited Destroy;
end;

function TLabelLayout.GetCapacity: Integer;
begin
  Result := FFormat.Columns * FFormat.Rows;
end;

procedure TLabelLayout.CheckFormat;
var
  Right, Bottom: TMillimetres;
begin
  if (FFormat.Columns < 1) or (FFormat.Rows < 1) then
    raise ELabelSheet.CreateFmt('%s: a sheet needs at least one label', [FFormat.Name]);
  Right := FFormat.LeftMargin + (FFormat.Columns - 1) * FFormat.PitchX + FFormat.LabelWidth;
  Bottom := FFormat.TopMargin + (FFormat.Rows - 1) * FFormat.PitchY + FFormat.LabelHeight;
  if (Right > PageWidth) or (Bottom > PageHeight) then
    raise ELabelSheet.CreateFmt('%s: labels run off the page (%.1f x %.1f mm)',
      [FFormat.Name, Double(Right), Double(Bottom)]);
  if (FFormat.PitchX < FFormat.LabelWidth) or (FFormat.PitchY < FFormat.LabelHeight) then
    raise ELabelSheet.CreateFmt('%s: labels overlap', [FFormat.Name]);
end;

procedure TLabelLayout.NewSheet;
begin
  Inc(FSheet);
  FNext := 0;
  FUsed.Clearall;
end;

{ The mask is what the user ticked in the dialog: one character per label, row by row,
  'x' for gone and '.' for there. Blanks and line ends are for the eye only. }
procedure TLabelLayout.LoadMask(const Mask: string);
var
  C: Char;
  N: Integer;
begin
  N := 0;
  FUsed.Clearall;
  for C in Mask do
    case C of
      ' ', #9, #10, #13: ;
      'x', 'X', '.':
        begin
          if N >= Capacity then
            raise ELabelSheet.Create('The mask has more labels than the sheet');
          FUsed[N] := C <> '.';
          Inc(N);
        end;
    else
      raise ELabelSheet.CreateFmt('Unexpected "%s" in the mask', [C]);
    end;
  if (N <> 0) and (N <> Capacity) then
    raise ELabelSheet.CreateFmt('The mask describes %d of %d labels', [N, Capacity]);
  FSheet := 0;
  FNext := 0;
end;

function TLabelLayout.SaveMask: string;
var
  Row, Col: Integer;
begin
  Result := '';
  for Row := 0 to FFormat.Rows - 1 do
  begin
    for Col := 0 to FFormat.Columns - 1 do
      if FUsed[Row * FFormat.Columns + Col] then
        Result := Result + 'x'
      else
        Result := Result + '.';
    Result := Result + LineEnding;
  end;
end;

procedure TLabelLayout.PlaceJob(AJobIndex, Copies: Integer);
var
  P: TPlacement;
begin
  while Copies > 0 do
  begin
    while (FNext < Capacity) and FUsed[FNext] do
      Inc(FNext);
    if FNext = Capacity then
    begin
      NewSheet;
      Continue;
    end;
    P.SheetNo := FSheet;
    P.JobIndex := AJobIndex;
    P.X := FFormat.LeftMargin + (FNext mod FFormat.Columns) * FFormat.PitchX;
    P.Y := FFormat.TopMargin + (FNext div FFormat.Columns) * FFormat.PitchY;
    FUsed[FNext] := True;
    if Assigned(FOnPlace) then
      FOnPlace(Self, P);
    Inc(FNext);
    Dec(Copies);
  end;
end;

end.
