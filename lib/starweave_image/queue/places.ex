defmodule StarweaveImage.Queue.Places do
  @moduledoc false
  # What those who watch a request are told of its place in the queue, and when that is news to them. Pure; the events are
  # sent by the queue.

  alias StarweaveImage.Queue.{Job, Schedule}

  @type event :: {:queued, map}

  @doc "The event that tells where a request that waits stands, and about when it will be its turn."
  @spec event(Schedule.t(), String.t()) :: event
  def event(schedule, id) do
    position = Schedule.position(schedule, id)

    {:queued,
     %{
       position: position,
       attempt: Schedule.attempts(schedule, id) + 1,
       estimated_start_ms: Schedule.wait_ms(schedule, position)
     }}
  end

  @doc "What a subscriber who comes late is told, so that a page that was loaded again goes on where it was."
  @spec late(Schedule.t(), Job.t()) :: [{atom, map}]
  def late(_schedule, %{status: :ending}), do: []

  def late(schedule, %{request: %{id: id}} = job) do
    if is_integer(Schedule.place(schedule, id)),
      do: Job.so_far(job),
      else: [event(schedule, id)]
  end

  @doc """
  Which of the jobs that are watched have come closer since their watchers were told; and whether any that waits is
  watched.
  """
  @spec news(Schedule.t(), %{String.t() => Job.t()}) :: {[Job.t()], watched? :: boolean}
  def news(schedule, jobs) do
    watched =
      for {id, position} <- Enum.with_index(Schedule.order(schedule), 1),
          %{subscribers: [_ | _]} = job <- [jobs[id]],
          do: {job, position}

    {for({job, position} <- watched, job.told != position, do: job), watched != []}
  end
end
