--  Gear_Cutter: find change gears for an old lathe or dividing head.
--
--  Given a set of wheels and a wanted ratio, list every compound train A/B * C/D whose error is
--  below a tolerance, best first. Wheels may be used only as often as they are in the box.

with Ada.Command_Line;
with Ada.Containers.Vectors;
with Ada.Exceptions;
with Ada.Text_IO;

procedure Gear_Cutter is

   package CL renames Ada.Command_Line;
   use Ada.Text_IO;

   subtype Tooth_Count is Positive range 12 .. 144;
   type Wheel_Index is range 1 .. 14;
   type Wheel_Box is array (Wheel_Index) of Tooth_Count;

   --  As listed on the inside of the cabinet door. There really are two 40s.
   Box : constant Wheel_Box :=
     (20, 25, 30, 35, 38, 40, 40, 45, 50, 55, 60, 65, 75, 127);

   --  The banjo is short: driver and driven of one pair must span between these sums,
   --  otherwise the studs either collide or do not reach.
   Min_Sum : constant := 55;
   Max_Sum : constant := 190;

   type Real is digits 15;

   type Train is record
      A, B, C, D : Wheel_Index;
      Ratio      : Real;
      Error      : Real;   --  relative, signed
   end record;

   package Train_Vectors is new Ada.Containers.Vectors (Positive, Train);

   function Better (L, R : Train) return Boolean is
     (if abs L.Error /= abs R.Error then abs L.Error < abs R.Error
      else Box (L.A) + Box (L.D) < Box (R.A) + Box (R.D));

   package Sorting is new Train_Vectors.Generic_Sorting ("<" => Better);

   function Meshes (X, Y : Wheel_Index) return Boolean is
     (Box (X) + Box (Y) in Min_Sum .. Max_Sum);

   --  Two wheels of equal count are the same solution; insist on the lower index first so that
   --  the pair of 40s does not print everything twice.
   function Canonical (Used : Wheel_Index; Free : Wheel_Index) return Boolean is
     (Box (Used) /= Box (Free) or else Used < Free);

   procedure Search (Wanted, Tolerance : Real; Found : in out Train_Vectors.Vector) is
      R, E : Real;
   begin
      for A in Wheel_Index loop
         for B in Wheel_Index loop
            if A /= B and then Meshes (A, B) then
               for C in Wheel_Index'First .. A loop
                  --  C never above A: swapping the two drivers changes nothing but the labels.
                  if C /= A and then C /= B and then Canonical (C, A) then
                     for D in Wheel_Index loop
                        if D /= A and then D /= B and then D /= C and then Meshes (C, D) then
                           R := Real (Box (A) * Box (C)) / Real (Box (B) * Box (D));
                           E := R / Wanted - 1.0;
                           if abs E <= Tolerance then
                              Found.Append (Train'(A, B, C, D, R, E));
                           end if;
                        end if;
                     end loop;
                  end if;
               end loop;
            end if;
         end loop;
      end loop;
   end Search;

   package Real_IO is new Float_IO (Real);

   procedure Show (T : Train) is
      procedure Wheel (I : Wheel_Index) is
         Image : constant String := Box (I)'Image;
      begin
         Put ((1 .. 5 - Image'Length => ' ') & Image);
      end Wheel;
   begin
      Wheel (T.A);
      Put (" /");
      Wheel (T.B);
      Put ("   x");
      Wheel (T.C);
      Put (" /");
      Wheel (T.D);
      Put ("    ");
      Real_IO.Put (T.Ratio, Fore => 2, Aft => 6, Exp => 0);
      Put ("    ");
      Real_IO.Put (T.Error * 1.0E6, Fore => 6, Aft => 0, Exp => 0);
      Put_Line (" ppm");
   end Show;

   Wanted    : Real;
   Tolerance : Real := 2.0E-4;
   Found     : Train_Vectors.Vector;
   Shown     : Natural := 0;

   Usage_Error : exception;

begin
   if CL.Argument_Count not in 1 .. 2 then
      raise Usage_Error with "usage: gear_cutter RATIO [PPM]";
   end if;

   begin
      Wanted := Real'Value (CL.Argument (1));
      if CL.Argument_Count = 2 then
         Tolerance := Real'Value (CL.Argument (2)) * 1.0E-6;
      end if;
   exception
      when Constraint_Error =>
         raise Usage_Error with "that is not a number";
   end;

   if Wanted not in 0.02 .. 50.0 then
      raise Usage_Error with "no train of four wheels reaches this ratio";
   end if;

   Search (Wanted, Tolerance, Found);
   Sorting.Sort (Found);

   for T of Found loop
      Show (T);
      Shown := Shown + 1;
      exit when Shown = 12;
   end loop;

   if Found.Is_Empty then
      Put_Line ("nothing within tolerance; try more ppm, or cut a new wheel");
      CL.Set_Exit_Status (CL.Failure);
   end if;

exception
   when E : Usage_Error =>
      Put_Line (Standard_Error, Ada.Exceptions.Exception_Message (E));
      CL.Set_Exit_Status (2);
end Gear_Cutter;
