!> Shallow water on a flat rotating rectangle, forward-backward in time on a staggered C grid.
!!
!!        v(i,j+1)
!!           |
!! u(i,j) - h(i,j) - u(i+1,j)
!!           |
!!        v(i,j)
!!
!! Only meant for the seiche study of the lake: no wetting and drying, no advection. If the surface
!! falls below the bed anywhere the run stops, because everything after that is fiction.
module shallow_water
   use, intrinsic :: iso_fortran_env, only: dp => real64, error_unit
   implicit none
   private
   public :: lake_t, lake_init, lake_step, lake_energy, lake_max_dt

   real(dp), parameter :: grav = 9.81_dp

   type :: lake_t
      integer  :: nx = 0, ny = 0
      real(dp) :: dx = 0, dy = 0
      real(dp) :: f = 0                      ! Coriolis parameter, 1/s
      real(dp) :: drag = 0                   ! linear bottom friction, 1/s
      real(dp), allocatable :: depth(:,:)    ! bed below datum, positive down; <= 0 is land
      real(dp), allocatable :: eta(:,:)      ! surface above datum
      real(dp), allocatable :: u(:,:), v(:,:)
      logical,  allocatable :: openu(:,:), openv(:,:)
   end type lake_t

contains

   subroutine lake_init(lake, depth, dx, dy, latitude_deg, drag, stat)
      type(lake_t), intent(out) :: lake
      real(dp), intent(in)  :: depth(:,:), dx, dy, latitude_deg, drag
      integer,  intent(out) :: stat
      real(dp), parameter :: omega = 7.2921e-5_dp, deg = acos(-1.0_dp)/180.0_dp
      integer :: i, j

      stat = 0
      if (dx <= 0 .or. dy <= 0) then
         stat = 1
         return
      end if
      lake%nx = size(depth, 1)
      lake%ny = size(depth, 2)
      lake%dx = dx
      lake%dy = dy
      lake%f = 2*omega*sin(latitude_deg*deg)
      lake%drag = drag
      allocate (lake%depth, source=depth)
      allocate (lake%eta(lake%nx, lake%ny), source=0.0_dp)
      allocate (lake%u(lake%nx + 1, lake%ny), source=0.0_dp)
      allocate (lake%v(lake%nx, lake%ny + 1), source=0.0_dp)

      ! A face lets water through only if both neighbours are wet. The outer frame stays closed.
      allocate (lake%openu(lake%nx + 1, lake%ny), source=.false.)
      allocate (lake%openv(lake%nx, lake%ny + 1), source=.false.)
      do concurrent (j=1:lake%ny, i=2:lake%nx)
         lake%openu(i, j) = min(depth(i - 1, j), depth(i, j)) > 0
      end do
      do concurrent (j=2:lake%ny, i=1:lake%nx)
         lake%openv(i, j) = min(depth(i, j - 1), depth(i, j)) > 0
      end do
   end subroutine lake_init

   !> Courant limit for the fastest gravity wave, with a tenth to spare.
   pure function lake_max_dt(lake) result(dt)
      type(lake_t), intent(in) :: lake
      real(dp) :: dt, c
      c = sqrt(grav*max(maxval(lake%depth), tiny(1.0_dp)))
      dt = 0.9_dp/(c*sqrt(1/lake%dx**2 + 1/lake%dy**2))
   end function lake_max_dt

   subroutine lake_step(lake, dt, taux, tauy, stat)
      type(lake_t), intent(inout) :: lake
      real(dp), intent(in)  :: dt
      real(dp), intent(in)  :: taux, tauy    ! wind stress / water density, m2/s2
      integer,  intent(out) :: stat
      real(dp) :: flux_w, flux_e, flux_s, flux_n, vbar, ubar, h, damp
      real(dp), allocatable :: uold(:,:)
      integer :: i, j

      stat = 0
      damp = 1/(1 + dt*lake%drag)

      ! Continuity first, with the old velocities ...
      do j = 1, lake%ny
         do i = 1, lake%nx
            if (lake%depth(i, j) <= 0) cycle
            flux_w = lake%u(i, j)*face(lake%depth, lake%eta, i - 1, j, i, j)
            flux_e = lake%u(i + 1, j)*face(lake%depth, lake%eta, i, j, i + 1, j)
            flux_s = lake%v(i, j)*face(lake%depth, lake%eta, i, j - 1, i, j)
            flux_n = lake%v(i, j + 1)*face(lake%depth, lake%eta, i, j, i, j + 1)
            lake%eta(i, j) = lake%eta(i, j) &
               - dt*((flux_e - flux_w)/lake%dx + (flux_n - flux_s)/lake%dy)
         end do
      end do
      ! NOTE: face() sees a mixture of old and new eta. The error is of second order in eta/depth,
      ! 1e-4 here; a deep copy every step costs a third of the run time.

      if (any(lake%depth > 0 .and. lake%depth + lake%eta <= 0)) then
         write (error_unit, '(a,2i5)') 'lake_step: bed exposed at ', minloc(lake%depth + lake%eta)
         stat = 2
         return
      end if

      ! ... then momentum with the new surface. Coriolis terms alternate u-first, old u for v.
      uold = lake%u
      do j = 1, lake%ny
         do i = 2, lake%nx
            if (.not. lake%openu(i, j)) cycle
            h = face(lake%depth, lake%eta, i - 1, j, i, j)
            vbar = 0.25_dp*sum(lake%v(i - 1:i, j:j + 1))
            lake%u(i, j) = damp*(lake%u(i, j) + dt*(lake%f*vbar + taux/h &
               - grav*(lake%eta(i, j) - lake%eta(i - 1, j))/lake%dx))
         end do
      end do
      do j = 2, lake%ny
         do i = 1, lake%nx
            if (.not. lake%openv(i, j)) cycle
            h = face(lake%depth, lake%eta, i, j - 1, i, j)
            ubar = 0.25_dp*sum(uold(i:i + 1, j - 1:j))
            lake%v(i, j) = damp*(lake%v(i, j) + dt*(-lake%f*ubar + tauy/h &
               - grav*(lake%eta(i, j) - lake%eta(i, j - 1))/lake%dy))
         end do
      end do
   end subroutine lake_step

   !> Water column at a face; 0 outside the grid, where the velocity is 0 anyway.
   pure real(dp) function face(depth, eta, ia, ja, ib, jb)
      real(dp), intent(in) :: depth(:,:), eta(:,:)
      integer,  intent(in) :: ia, ja, ib, jb
      face = 0
      if (min(ia, ja) < 1 .or. ib > size(depth, 1) .or. jb > size(depth, 2)) return
      face = 0.5_dp*(depth(ia, ja) + eta(ia, ja) + depth(ib, jb) + eta(ib, jb))
   end function face

   !> Potential plus kinetic energy per unit density, m5/s2. Without wind and drag it should wobble
   !! about a constant; a steady climb means dt is too long.
   pure real(dp) function lake_energy(lake)
      type(lake_t), intent(in) :: lake
      real(dp) :: area, ke
      integer :: i, j
      area = lake%dx*lake%dy
      lake_energy = 0.5_dp*grav*area*sum(lake%eta**2, mask=lake%depth > 0)
      do j = 1, lake%ny
         do i = 1, lake%nx
            if (lake%depth(i, j) <= 0) cycle
            ke = sum(lake%u(i:i + 1, j)**2) + sum(lake%v(i, j:j + 1)**2)
            lake_energy = lake_energy + 0.25_dp*area*lake%depth(i, j)*ke
         end do
      end do
   end function lake_energy
end module shallow_water
